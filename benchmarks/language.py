"""Times training rounds of the language experiment: the authors', PEFT's and metalora's.

python -m benchmarks.language                                    # a small model on the CPU
python -m benchmarks.language --device cuda --model roberta-base-size --precision bf16
python -m benchmarks.language --data DIR --tokenizer FOLDER      # dialogues of ConvAI2
python -m benchmarks.language --model llama-mini --turns 8       # a causal language model

A model named by its size has random weights; without --data tokens are random, and lengths are
drawn like ConvAI2's. A causal model learns every next token of what was said and the one answer.
Versions that do not pack use transformers' default attention. Loss and
gradients of every version are compared with plain PyTorch in float64 first, without dropout, which
is on while timing. All versions take one optimiser step a round. Peak memory is the most that a
round takes beside the weights, their gradients and AdamW's state.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.cases import PRECISIONS, Benchmark, Options
from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.dialogues import CANDIDATES, Turns, drawn, read
from benchmarks.lib.encoders import DECODERS, SIZES, new_decoder, new_model
from benchmarks.lib.measure import CpuClock
from benchmarks.lib.operators import measure
from benchmarks.lib.step_case import StepCase
from benchmarks.lib.step_versions import (
    AT_ONCE,
    AUTHORS,
    FUSED,
    MAX_TOKENS,
    PACKED,
    PEFT,
    SORTED,
    TO_THE_BATCH,
    Setting,
    decoder_lora,
    in_precision,
    language_lora,
    language_setting,
    next_token_loss,
)
from experiments.language.encoders import load_model, load_tokenizer
from experiments.lib.cli import check_values, main_guard, option, parse
from metalora.meta import RoundLoader

FULL = (AUTHORS, PEFT, TO_THE_BATCH, AT_ONCE, SORTED, PACKED, FUSED)
SHORT = ("+ bf16", in_precision(AUTHORS, "bf16"), in_precision(PEFT, "bf16"))


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of this benchmark."""

    model: str = option("mini", help=f"{', '.join([*SIZES, *DECODERS])}, or a model's folder")
    data: Path | None = option(None, help="folder of ConvAI2's dialogues")
    tokenizer: str | None = option(None, help="folder, for --data (default: the model's)")
    tasks: int = option(4, help="number of tasks")
    turns: int = option(2, help="of each task in a round")
    rounds: int = option(3, help="to measure, each of them twice")
    precision: str = option("fp32", choices=("fp32", "bf16"), help="bf16 adds versions")
    threads: int | None = option(
        None, help="torch's threads (default: torch's choice); with 1, processor time is measured"
    )
    max_tokens: int | None = option(
        None, help="in a pass of metalora's (default: 16384, with --device cuda 32768)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values("language", self, most={"threads": os.cpu_count() or 1})
        if self.data is not None and self.model in SIZES and self.tokenizer is None:
            raise ValueError("argument --data: needs --tokenizer FOLDER with a model of a size")
        if self.data is not None and self.model in DECODERS:
            raise ValueError("argument --data: is for encoders; leave it out")


def make_setting(settings: Settings) -> tuple[Setting, str]:
    """The model and the dialogues that the settings name, and where these are from."""
    name, device = settings.model, settings.device
    if name in DECODERS:
        decoder: Any = new_decoder(name)
        turns = drawn(settings.tasks, decoder.config.vocab_size, candidates=1)
        rounds, max_tokens = _rounds(turns, settings)
        lora, loss = decoder_lora(), next_token_loss
        return language_setting(
            decoder, turns, rounds, max_tokens, device, lora, loss
        ), turns.source
    tokenizer: Any = None
    if settings.data is not None or name not in SIZES:
        tokenizer = load_tokenizer(settings.tokenizer or name)
    model: Any
    if name in SIZES:
        model = new_model(name, 0 if tokenizer is None else len(tokenizer))
    else:
        model = load_model(name, tokenizer)
    if settings.data is None:
        turns = drawn(settings.tasks, model.config.vocab_size)
    else:
        turns = read(settings.data, model, tokenizer, settings.tasks)
    rounds, max_tokens = _rounds(turns, settings)
    lora = language_lora()
    return language_setting(model, turns, rounds, max_tokens, device, lora), turns.source


def _rounds(turns: Turns, settings: Settings) -> tuple[RoundLoader, int]:
    """The loader, and how many tokens a pass of metalora's has at most."""
    rounds = RoundLoader(
        torch.arange(len(turns.answers)),
        turns.answers,
        turns.task_ids,
        batch_size=settings.turns,
        max_rounds=settings.rounds,
    )
    return rounds, settings.max_tokens or MAX_TOKENS[settings.device]


def benchmark(setting: Setting, source: str, name: str, precision: str) -> Benchmark:
    """The benchmark of one setting; ``source`` says where its dialogues are from."""
    names = FULL if precision == "fp32" else (*FULL, *SHORT)
    case = StepCase("lora_linear", "cpu", name, source, lambda device: setting, names)
    what = f"{CANDIDATES} candidates a turn" if setting.lora.heads else "a causal model"
    title = f"Rounds of LoRA-ML, {what}, {source}"
    return Benchmark("language", title, (case,), {"all": names}, floor=AUTHORS)


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    settings = parse(Settings, argv, prog=program("language"), description=__doc__ or "")
    if settings.smoke:
        settings = replace(settings, model="tiny", data=None, tasks=2, turns=1, rounds=1)
    name = f"{settings.model}, {settings.tasks} tasks of {settings.turns} turns"
    found = benchmark(*make_setting(settings), name, settings.precision)
    options = Options(tuple(found.versions["all"]), settings.device)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.device == "cpu" and settings.threads == 1:
        options = replace(options, timer=CpuClock(time.process_time))
    precisions = [PRECISIONS["fp32"]]
    measure(found, found.cases, precisions, options, settings, command=repeat("language", argv))


if __name__ == "__main__":
    main()
