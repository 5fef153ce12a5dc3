"""Times the shallow network's training beside eager PyTorch, in about a minute.

python -m benchmarks.bench_shallow [--threads N] [--write benchmarks/results]

The trainings are the paper's: d = 10, T = 3, k = 1, N = 1000, ten of them, n = 100 in fine-tuning,
float32. Every version's losses are compared with the native ones in float64 before anything is
timed; then all versions are timed in turns, so that whatever else the machine does meets all.

On one thread, the default, it is processor time that is measured. That is the fair comparison on
any number of cores: trainings are independent, and eager PyTorch makes most of the cores with a
process on each, since its tensors are too small to share between threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cli import TableSettings, parse
from benchmarks.lib.measure import CpuClock, Timing, side_by_side
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard, option
from metalora._checks import check_count
from metalora._library import native_available
from metalora.reference import shallow as reference
from metalora.shallow import (
    Adapters,
    Network,
    finetune_lora,
    initial_adapters,
    initial_network,
    lora_ml,
    sample_data,
    sample_problem,
    standard,
)

TRAININGS, TASKS, SAMPLES, DIM, RANK, FEW = 10, 3, 1000, 10, 1, 100
ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01)
NATIVE_EPOCHS, REFERENCE_EPOCHS, EAGER_EPOCHS, GATE_EPOCHS, ROUNDS = 400, 10, 10, 20, 15
GROUPS = ("LoRA-ML retraining", "standard retraining", "fine-tuning")
HEADER = ["", "version", "trainings at once", "µs an epoch and training (quartiles)", "relative"]


@dataclass(frozen=True)
class Start:
    """What ten trainings begin with: x [B, T, N, d], y [B, T, N], and T = 1 in fine-tuning."""

    group: str
    x: Tensor
    y: Tensor
    network: Network
    adapters: Adapters | None


def start(group: str, dtype: torch.dtype) -> Start:
    """The same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    common: dict[str, Any] = {"generator": generator, "dtype": dtype}
    problem = sample_problem(TASKS, DIM, RANK, batch_shape=(TRAININGS,), **common)
    network = initial_network(DIM, batch_shape=(TRAININGS,), **common)
    tasks, count, truth = TASKS, SAMPLES, problem.networks
    if group == "fine-tuning":
        tasks, count = 1, FEW
        test = problem.test_network
        truth = Network(test.weight.unsqueeze(1), test.output.unsqueeze(1))
    x, y = sample_data(truth, count, generator=generator)
    adapters = initial_adapters(RANK, DIM, batch_shape=(TRAININGS, tasks), **common)
    return Start(group, x, y, network, None if group == "standard retraining" else adapters)


def native(s: Start, epochs: int) -> Tensor:
    """The losses [B, epochs] of metalora's trainer."""
    if s.group == "standard retraining":
        return standard(s.x, s.y, s.network, epochs=epochs).losses
    assert s.adapters is not None
    if s.group == "LoRA-ML retraining":
        return lora_ml(s.x, s.y, s.network, s.adapters, epochs=epochs).losses
    adapters = Adapters(s.adapters.lora_A[:, 0], s.adapters.lora_B[:, 0])
    return finetune_lora(s.x[:, 0], s.y[:, 0], s.network, adapters, epochs=epochs).losses


def explicit(s: Start, epochs: int) -> Tensor:
    """The same with the reference: gradients written out, tensors of all trainings."""
    weight, output = s.network.weight, s.network.output
    if s.adapters is None:
        return reference.retrain(s.x, s.y, weight, output, None, None, epochs, *ADAMW)[4]
    a, b = s.adapters.lora_A, s.adapters.lora_B
    if s.group == "LoRA-ML retraining":
        return reference.retrain(s.x, s.y, weight, output, a, b, epochs, *ADAMW)[4]
    x, y, a, b = s.x[:, 0], s.y[:, 0], a[:, 0], b[:, 0]
    return reference.finetune_lora(x, y, weight, output, a, b, epochs, *ADAMW)[2]


class Eager:
    """Eager PyTorch with autograd and torch.optim.AdamW; goes on from epoch to epoch."""

    def __init__(self, s: Start, trainings: int | None, *, fused: bool, rows: bool = True) -> None:
        self.x, self.y = s.x[:trainings], s.y[:trainings]
        if s.adapters is None:  # the tasks are one
            self.x, self.y = self.x.flatten(1, 2).unsqueeze(1), self.y.flatten(1, 2).unsqueeze(1)
        self.rows = rows
        frozen = s.group == "fine-tuning"
        self.weight = s.network.weight[:trainings].clone().requires_grad_(not frozen)
        self.output = s.network.output[:trainings].clone().requires_grad_(not frozen)
        self.adapters: list[Tensor] = []
        if s.adapters is not None:
            pair = (s.adapters.lora_A, s.adapters.lora_B)
            self.adapters = [p[:trainings].clone().requires_grad_() for p in pair]
        self.columns = self.x.flatten(0, 1).mT.contiguous()
        leaves = [p for p in (self.weight, self.output, *self.adapters) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(leaves, lr=ADAMW[0], weight_decay=ADAMW[4], fused=fused)

    def step(self, loss: Tensor) -> Tensor:
        """One epoch's backward and step; ``loss`` [B]."""
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()

    def loop(self) -> Tensor:
        """An epoch of one training, a loop over its tasks."""
        loss = torch.zeros((), dtype=self.x.dtype)
        for t in range(self.x.shape[1]):
            hidden = self.x[0, t] @ self.weight[0].T
            if self.adapters:
                hidden = hidden + self.x[0, t] @ self.adapters[0][0, t].T @ self.adapters[1][0, t].T
            predicted = hidden.sigmoid() @ self.output[0]
            loss = loss + torch.nn.functional.mse_loss(predicted, self.y[0, t])
        return self.step((loss / self.x.shape[1]).reshape(1))

    def batched(self) -> Tensor:
        """An epoch of all trainings and tasks in one batched product, adapters merged into A."""
        trainings, tasks, count, dim = self.x.shape
        weight = self.weight.unsqueeze(1).expand(trainings, tasks, dim, dim).flatten(0, 1)
        if self.adapters:
            a, b = (p.flatten(0, 1) for p in self.adapters)
            weight = torch.baddbmm(weight, b, a)
        output = self.output.unsqueeze(1).expand(trainings, tasks, dim).flatten(0, 1)
        if self.rows:  # samples are rows
            hidden = torch.bmm(self.x.flatten(0, 1), weight.mT).sigmoid()
            predicted = torch.bmm(hidden, output.unsqueeze(-1))
        else:
            hidden = torch.bmm(weight, self.columns).sigmoid()
            predicted = torch.bmm(output.unsqueeze(1), hidden)
        error = predicted.reshape(trainings, tasks, count) - self.y
        return self.step(error.square().mean((1, 2)))


def versions(s: Start) -> dict[str, tuple[int, Callable[[int], Tensor]]]:
    """By name: how many trainings at once, and what runs so many epochs, losses [B, epochs]."""

    def eager(trainings: int | None, form: str, **options: bool) -> Callable[[int], Tensor]:
        model = Eager(s, trainings, **{"fused": True, **options})
        epoch = getattr(model, form)
        return lambda epochs: torch.stack([epoch() for _ in range(epochs)], -1)

    return {
        "native": (TRAININGS, lambda epochs: native(s, epochs)),
        "eager, loop over tasks": (1, eager(1, "loop", fused=False)),
        "eager, loop over tasks, fused AdamW": (1, eager(1, "loop")),
        "eager, tasks batched, fused AdamW": (1, eager(1, "batched")),
        "eager, tasks and trainings batched, fused AdamW": (TRAININGS, eager(None, "batched")),
        "the same, samples as columns": (TRAININGS, eager(None, "batched", rows=False)),
        "explicit gradients, all batched": (TRAININGS, lambda epochs: explicit(s, epochs)),
    }


def check(group: str) -> None:
    """Raises AssertionError where a version's losses differ from the native ones in float64."""
    losses = {
        name: run(GATE_EPOCHS) for name, (_, run) in versions(start(group, torch.float64)).items()
    }
    expected = losses.pop("native")
    for name, found in losses.items():
        torch.testing.assert_close(
            found, expected[: len(found)], rtol=1e-9, atol=0, msg=f"{group}, {name}"
        )


def measure(group: str, clock: Callable[[], float]) -> dict[str, tuple[int, Timing]]:
    """By version: trainings at once, and seconds an epoch and training."""
    found = versions(start(group, torch.float32))
    epochs = dict.fromkeys(found, EAGER_EPOCHS)
    epochs |= {"native": NATIVE_EPOCHS, "explicit gradients, all batched": REFERENCE_EPOCHS}
    candidates = {
        name: [{"train": lambda run=run, n=epochs[name]: run(n)}]
        for name, (_, run) in found.items()
    }
    timings = side_by_side(candidates, rounds=ROUNDS, timer=CpuClock(clock))
    result = {}
    for name, steps in timings.items():
        trainings, timing = found[name][0], steps["train"]
        scale = 1 / (epochs[name] * trainings)
        low, median, high = (t * scale for t in (timing.low, timing.median, timing.high))
        result[name] = (trainings, replace(timing, low=low, median=median, high=high))
    return result


@dataclass(frozen=True)
class Settings(TableSettings):
    """Settings of this benchmark."""

    threads: int = option(1, help="torch's threads")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("bench_shallow", "--threads", self.threads, maximum=os.cpu_count())


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    settings = parse(Settings, argv, "bench_shallow", __doc__)
    if not native_available():
        print("the native library is not built: 'native' below is the reference")
    torch.set_num_threads(settings.threads)
    alone = settings.threads == 1
    rows, data = [], []
    for group in GROUPS:
        check(group)
        timings = measure(group, time.process_time if alone else time.perf_counter)
        ours = timings["native"][1].median
        for name, (trainings, t) in timings.items():
            quartiles = f"{t.median * 1e6:,.1f} ({t.low * 1e6:,.1f} to {t.high * 1e6:,.1f})"
            rows.append([group, name, str(trainings), quartiles, f"{t.median / ours:.1f}x"])
            record = {"group": group, "version": name, "trainings": trainings}
            data.append({**record, "median": t.median, "low": t.low, "high": t.high})
    write_table(
        "shallow_training",
        f"The shallow network's training: {'processor' if alone else 'wall'} time an epoch and "
        "training, and relative to native",
        f"python -m benchmarks.bench_shallow --threads {settings.threads} "
        "--write benchmarks/results",
        HEADER,
        rows,
        data,
        settings.write,
    )


if __name__ == "__main__":
    main()
