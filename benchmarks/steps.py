"""Times whole training steps of LoRA-ML: forward, loss, backward and optimiser.

python -m benchmarks.steps --threads 1 --write benchmarks/results
python -m benchmarks.steps --cases mixer --baselines "+ bf16" "plain model, bf16"

The versions are the plain model without adapters, with all tasks pooled; the authors' schedule in
plain PyTorch, task by task; the same through PEFT; merged weights in plain PyTorch; and metalora,
with one thing more from version to version. Loss and gradients of every version are compared with
float64 first, without dropout. "faster fp32" are float32 products by oneDNN, "bf16" is autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.dialogues import Turns, drawn
from benchmarks.lib.encoders import new_model
from benchmarks.lib.operators import command
from benchmarks.lib.step_case import StepCase, step_tables
from benchmarks.lib.step_versions import (
    AT_ONCE,
    AUTHORS,
    COMPILED,
    DROPOUT,
    FUSED,
    MAX_TOKENS,
    MERGED,
    PACKED,
    PEFT,
    PLAIN,
    SORTED,
    TO_THE_BATCH,
    Setting,
    in_precision,
    language_lora,
    language_setting,
    tensor_setting,
)
from benchmarks.lib.task_by_task import FASTER, PRECISIONS
from benchmarks.lora_linear import zipf
from experiments.lib.machine import keep_freed_memory
from experiments.vision.mixer import Mixer
from experiments.vision.settings import DEFAULTS, MODELS
from experiments.vision.trials import CPU_PATCHES, ImagePasses
from metalora.adapters import LoRAConfig
from metalora.hf import Sequences
from metalora.meta import Batch, RoundLoader, TrainConfig

PLAINS = tuple(in_precision(PLAIN, precision) for precision in PRECISIONS)
MERGED_VERSIONS = tuple(
    f"{in_precision(MERGED, precision)}{how}"
    for precision in ("fp32", "bf16")
    for how in ("", ", compiled")
)
INGREDIENTS = (FUSED, f"+ {FASTER}", "+ bf16")
OTHERS = (AUTHORS, in_precision(AUTHORS, "bf16"), PEFT, TO_THE_BATCH)
VERSIONS = (*PLAINS, *OTHERS, *MERGED_VERSIONS, AT_ONCE, SORTED, PACKED, *INGREDIENTS, COMPILED)
PROFILED = (PLAINS[0], PLAINS[2], FUSED, "+ bf16")


def mixer(*, tiny: bool = False, device: str = "cpu") -> Setting:
    """The paper's Mixer with the vision experiment's batches and optimiser, on random images."""
    config = MODELS["digits" if tiny else "cifar10"]
    values, tasks = DEFAULTS["cifar10"], 4
    count = 8 if tiny else int(values["batch_size"])
    torch.manual_seed(0)
    model = Mixer(config).to(device)
    size = (tasks * count, config.channels, config.image_size, config.image_size)
    images = torch.randn(size).to(device)
    labels = torch.randint(config.classes, (tasks * count,)).to(device)
    ids = torch.arange(tasks).repeat_interleave(count)

    def first_round(batch_size: int) -> tuple[RoundLoader, Batch]:
        rounds = RoundLoader(images, labels, ids, batch_size=batch_size, shuffle=False)
        return rounds, next(iter(rounds))

    rounds, batch = first_round(count)
    _, few = first_round(2)
    return tensor_setting(
        *(model, rounds, batch, few),
        LoRAConfig(1, target_modules=r"embed|head|.*_mlp\.[03]"),
        TrainConfig(1, values["lr"], values["weight_decay"]),
        "images/s",
        ImagePasses(CPU_PATCHES // config.patches) if device == "cpu" else None,
    )


def equal_lengths(dropout: float, *, tiny: bool = False, device: str = "cpu") -> Setting:
    """The encoder of MiniLM's size on a turn of 4 tasks each, 20 candidates of 48 tokens."""
    tasks, candidates, length = 4, (4 if tiny else 20), (6 if tiny else 48)
    model: Any = new_model("tiny" if tiny else "minilm-size")
    starts = torch.arange(tasks * candidates + 1) * length
    tokens = torch.randint(5, model.config.vocab_size, (int(starts[-1]),))
    answers = torch.randint(candidates, (tasks,))
    sequences = Sequences({"input_ids": tokens}, starts, candidates)
    turns = Turns(sequences, answers, torch.arange(tasks), "equal lengths")
    return _language(model, turns, device, dropout)


def dialogues(
    size: str, tasks: int, candidates: int, *, tiny: bool = False, device: str = "cpu"
) -> Setting:
    """An encoder on a turn of each task, with lengths drawn like ConvAI2's."""
    model: Any = new_model("tiny" if tiny else size)
    turns = drawn(tasks, model.config.vocab_size, candidates=2 if tiny else candidates)
    return _language(model, turns, device)


def _language(model: Any, turns: Turns, device: str, dropout: float = DROPOUT) -> Setting:
    samples = torch.arange(len(turns.answers))
    rounds = RoundLoader(samples, turns.answers, turns.task_ids, batch_size=1, max_rounds=1)
    lora = language_lora(dropout)
    return language_setting(model, turns, rounds, MAX_TOKENS[device], device, lora)


def ragged(*, tiny: bool = False, device: str = "cpu") -> Setting:
    """A three-layer network for many tasks: few with many samples, most with one, some absent."""
    tasks, features, total = (12, 8, 60) if tiny else (640, 64, 6400)
    counts = [0 if t % 10 == 9 else max(1, n) for t, n in enumerate(zipf(total, tasks))]
    torch.manual_seed(0)
    layers = [part for _ in range(2) for part in (nn.Linear(features, features), nn.GELU())]
    model = nn.Sequential(*layers, nn.Linear(features, 10)).to(device)
    ids = torch.arange(tasks).repeat_interleave(torch.tensor(counts)).to(device)
    inputs = torch.randn(len(ids), features).to(device)
    targets = torch.randint(10, (len(ids),)).to(device)
    batch = Batch(inputs, targets, ids, tuple(counts))
    # No task of a loader may be without samples; the training needs their number alone of it.
    every = torch.arange(tasks)
    rounds = RoundLoader(inputs[:tasks], targets[:tasks], every, batch_size=1)
    return tensor_setting(
        *(model, rounds, batch, batch),
        LoRAConfig(4, target_modules="[024]"),
        TrainConfig(1, 1e-3, 0.01, optimizer="adamw"),
        "samples/s",
    )


def _case(
    name: str, title: str, new_setting: Callable[..., Setting], *versions: str, **more: Any
) -> StepCase:
    names = tuple(version for version in VERSIONS if version in versions)
    return StepCase("lora_linear", "cpu", name, title, new_setting, names, **more)


_MAIN = (*PLAINS, AUTHORS, PEFT, AT_ONCE, *INGREDIENTS)
_LARGE = (*PLAINS, AUTHORS, *INGREDIENTS)
_LARGEST = (PLAINS[0], PLAINS[2], AUTHORS, FUSED, "+ bf16")  # all are in memory at once
CASES = (
    _case(
        "mixer",
        "MLP-Mixer, 4 tasks of 256 images, r 1",
        mixer,
        *_MAIN,
        COMPILED,
        *MERGED_VERSIONS,
        profiled=PROFILED,
        samples=2,
    ),
    _case(
        "minilm",
        "MiniLM's size, 4 tasks of 20 sequences of 48 tokens, r 8, dropout 0.1",
        partial(equal_lengths, DROPOUT),
        *_MAIN,
        *(PACKED, COMPILED),
        profiled=PROFILED,
        samples=2,
    ),
    _case(
        "minilm-p0",
        "MiniLM's size, 4 tasks of 20 sequences of 48 tokens, r 8, no dropout in LoRA",
        partial(equal_lengths, 0.0),
        *_LARGE,
        *(MERGED, in_precision(MERGED, "bf16"), AT_ONCE, PACKED),
        samples=2,
    ),
    _case(
        "dialogues",
        "MiniLM's size, 4 tasks of 10 sequences like ConvAI2's, r 8, dropout 0.1",
        partial(dialogues, "minilm-size", 4, 10),
        *_MAIN,
        *OTHERS,
        SORTED,
        PACKED,
    ),
    _case(
        "dialogues-t10",
        "MiniLM's size, 10 tasks of 4 sequences like ConvAI2's, r 8, dropout 0.1",
        partial(dialogues, "minilm-size", 10, 4),
        *_LARGE,
    ),
    _case(
        "roberta",
        "RoBERTa-base's size, 4 tasks of 2 sequences like ConvAI2's, r 8, dropout 0.1",
        partial(dialogues, "roberta-base-size", 4, 2),
        *_LARGEST,
    ),
    _case(
        "roberta-t10",
        "RoBERTa-base's size, 10 tasks of 1 sequence like ConvAI2's, r 8, dropout 0.1",
        partial(dialogues, "roberta-base-size", 10, 1),
        *_LARGEST,
    ),
    _case(
        "ragged",
        "3 layers of 64 features, 640 tasks of 0 to 909 samples, r 4",
        ragged,
        *PLAINS,
        *(AUTHORS, MERGED, AT_ONCE),
        *INGREDIENTS,
        samples=10,
    ),
)
BENCHMARK = Benchmark(
    "steps",
    "Whole training steps of LoRA-ML",
    CASES,
    {"all": VERSIONS},
    floor=AUTHORS,
    groups={"cpu": "cpu", "cuda": "cpu"},
    own_precisions=True,
    page=step_tables,
)

_measure = command(BENCHMARK, __doc__)


def main(argv: Sequence[str] | None = None) -> None:
    """Measures as the experiments run: freed memory stays with the process."""
    keep_freed_memory()
    _measure(argv)


if __name__ == "__main__":
    main()
