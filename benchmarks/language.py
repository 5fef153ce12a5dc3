"""Times training rounds of the language experiment: the authors', PEFT's and metalora's.

python -m benchmarks.language                                    # a small model on the CPU
python -m benchmarks.language --device cuda --model roberta-base-size --precision bf16
python -m benchmarks.language --data DIR --tokenizer FOLDER      # dialogues of ConvAI2

A model named by its size has random weights; without --data tokens are random, and lengths are
drawn like ConvAI2's. Versions that do not pack use transformers' default attention. Loss and
gradients of every version are compared with plain PyTorch in float64 first, without dropout, which
is on while timing. All versions take one optimiser step a round. Peak memory is the most that a
round takes beside the weights, their gradients and AdamW's state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.lib.cases import PRECISIONS, Benchmark, Candidate, Case, Options, Precision
from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.dialogues import CANDIDATES, drawn, read
from benchmarks.lib.language_versions import (
    AUTHORS,
    TOLERANCE,
    Setting,
    check,
    exact,
    gate_batch,
    results,
    versions,
)
from benchmarks.lib.measure import peak_bytes
from benchmarks.lib.operators import measure
from experiments.language.encoders import load_model, load_tokenizer
from experiments.lib.cli import check_values, main_guard, option, parse
from metalora.meta import RoundLoader

# layers, hidden size, heads, intermediate size, vocabulary
SIZES = {
    "tiny": (2, 32, 2, 64, 100),
    "mini": (2, 256, 4, 1024, 30522),
    "minilm-size": (6, 384, 12, 1536, 30522),
    "roberta-base-size": (12, 768, 12, 3072, 50265),
}
MAX_TOKENS = {"cpu": 16384, "cuda": 32768}  # in a pass of metalora's


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of this benchmark."""

    model: str = option("mini", help=f"{', '.join(SIZES)}, or a model's folder")
    data: Path | None = option(None, help="folder of ConvAI2's dialogues")
    tokenizer: str | None = option(None, help="folder, for --data (default: the model's)")
    tasks: int = option(4, help="number of tasks")
    turns: int = option(2, help="of each task in a round")
    rounds: int = option(3, help="to measure, each of them twice")
    precision: str = option("fp32", choices=tuple(TOLERANCE), help="bf16 adds versions")
    max_tokens: int | None = option(
        None, help="in a pass of metalora's (default: 16384, with --device cuda 32768)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values("language", self)
        if self.data is not None and self.model in SIZES and self.tokenizer is None:
            raise ValueError("argument --data: needs --tokenizer FOLDER with a model of a size")


def new_model(size: str, tokens: int = 0, seed: int = 0) -> nn.Module:
    """A RoBERTa of this size with random weights and a vocabulary of at least ``tokens``."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    layers, hidden, heads, intermediate, vocabulary = SIZES[size]
    config = RobertaConfig(
        vocab_size=max(vocabulary, tokens),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=intermediate,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    torch.manual_seed(seed)
    model: nn.Module = RobertaForSequenceClassification(config)
    return model


def make_setting(settings: Settings) -> Setting:
    """The model and the dialogues that the settings name."""
    name, device = settings.model, settings.device
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
    rounds = RoundLoader(
        torch.arange(len(turns.answers)),
        turns.answers,
        turns.task_ids,
        batch_size=settings.turns,
        max_rounds=settings.rounds,
    )
    max_tokens = settings.max_tokens or MAX_TOKENS[device]
    return Setting(model.to(device), turns, rounds, max_tokens, device)


@dataclass(frozen=True)
class RoundCase(Case):
    """Training rounds of a setting; ``short`` is the precision of the versions added, or fp32."""

    setting: Setting
    short: str

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        setting, rounds, few = self.setting, list(self.setting.rounds), gate_batch(self.setting)
        wanted, makers = exact(setting, few), versions(setting, self.short)

        def make(name: str) -> Candidate:
            version = makers[name]()
            error = check(results(version, setting, few), wanted, TOLERANCE[version.precision])
            version.round(few)  # makes the optimiser's state
            peak = peak_bytes(partial(version.round, rounds[0]), setting.device)
            calls = [inputs["input_ids"] for batch in rounds for inputs in version.inputs(batch)]
            padding = 1 - self.tokens() * len(rounds) / sum(ids.numel() for ids in calls)
            steps = [{"round": partial(version.round, batch)} for batch in rounds]
            return Candidate(steps, error, peak_bytes=peak, padding=padding)

        return make

    def tokens(self) -> float:
        """The tokens of a round, padding left out."""
        lengths, rounds = self.setting.turns.sequences.lengths, list(self.setting.rounds)
        return sum(int(lengths[batch.inputs].sum()) for batch in rounds) / len(rounds)

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        return {"work": {"unit": "tokens/s", "scale": 1, "amounts": {"round": self.tokens()}}}


def benchmark(setting: Setting, name: str, short: str) -> Benchmark:
    """The benchmark of one setting."""
    return Benchmark(
        "language",
        f"Rounds of LoRA-ML, {CANDIDATES} candidates a turn, {setting.turns.source}",
        (RoundCase("lora_linear", "cpu", name, setting, short, once=True),),
        {"all": tuple(versions(setting, short))},
        floor=AUTHORS,
    )


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints the table."""
    settings = parse(Settings, argv, prog=program("language"), description=__doc__ or "")
    if settings.smoke:
        settings = replace(settings, model="tiny", data=None, tasks=2, turns=1, rounds=1)
    name = f"{settings.model}, {settings.tasks} tasks of {settings.turns} turns"
    found = benchmark(make_setting(settings), name, settings.precision)
    options = Options(tuple(found.versions["all"]), settings.device)
    precisions = [PRECISIONS["fp32"]]
    measure(found, found.cases, precisions, options, settings, command=repeat("language", argv))


if __name__ == "__main__":
    main()
