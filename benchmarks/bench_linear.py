"""Times the linear model's training beside its alternatives: python -m benchmarks.bench_linear.

One training is the paper's: d = 10, T = 3, k = 1, N = 5000, 3000 outer steps of 10 inner ones each.
The versions that go through the samples at every step run a few outer steps only; their time is
scaled up. Every version's iterates are compared with the native ones before anything is timed.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import machine
from experiments.runs import RunFolder
from experiments.synthetic import figures, linear, trials
from experiments.synthetic.settings import LinearSettings
from metalora._library import native_available
from metalora.linear import (
    finetune_lora,
    retrain_lora_ml,
    retrain_standard,
    sample_data,
    sample_problem,
    sufficient_statistics,
)
from metalora.reference import linear as reference

TASKS, DIM, RANK, SAMPLES, OUTER, INNER = 3, 10, 1, 5000, 3000, 10
OUTER_LR, INNER_LR = 0.03, 0.003
SHORT = 5  # outer steps of the versions that go through the samples
MANY = 64  # trainings at once


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, with the fastest and the slowest run."""

    name: str
    threads: int
    median: float
    fastest: float
    slowest: float
    runs: int
    note: str = ""


def main() -> None:
    """Prints the table."""
    print("  ".join(f"{key}: {value}" for key, value in machine().items()))
    if not native_available():
        print("the native library is not built: 'native' below is the reference")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows = [*_one_training(), *_other_trainers()]
    torch.set_num_threads(threads)
    rows += [_many_trainings(threads), *_figure_1(threads)]
    print(_table(rows))


def _one_training() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    problem = sample_problem(TASKS, DIM, RANK, generator=generator)
    x, y = sample_data(problem.truths, SAMPLES, generator=generator)
    start = 0.1 * torch.randn(TASKS, DIM, RANK, generator=generator, dtype=torch.float64)
    stats = sufficient_statistics(x, y)
    single, single_start = stats.to(dtype=torch.float32), start.float()

    def native(outer_steps: int = OUTER) -> Tensor:
        return retrain_lora_ml(stats, RANK, outer_steps=outer_steps, initial_factors=start).weight

    def native_single() -> Tensor:
        return retrain_lora_ml(single, RANK, initial_factors=single_start).weight

    def plain(outer_steps: int = OUTER) -> Tensor:
        zero = torch.zeros(DIM, DIM, dtype=torch.float64)
        return reference.retrain_lora_ml(
            *(stats.gram, stats.cross, stats.energy, zero, start, SAMPLES),
            *(outer_steps, INNER, OUTER_LR, INNER_LR),
        )[0]

    def torch_samples() -> Tensor:
        return _through_samples_torch(x, y, start, SHORT)

    def numpy_samples() -> Tensor:
        return torch.from_numpy(_through_samples_numpy(x.numpy(), y.numpy(), start.numpy(), SHORT))

    for other in (plain(SHORT), torch_samples(), numpy_samples()):
        torch.testing.assert_close(other, native(SHORT), rtol=0, atol=1e-10)
    scale = OUTER / SHORT
    note = f"{SHORT} outer steps timed, scaled to {OUTER}"
    return [
        _time("LoRA-ML, native, float64", native, runs=21),
        _time("LoRA-ML, native, float32", native_single, runs=21),
        _time("LoRA-ML, reference (plain PyTorch)", plain, runs=3),
        _time("LoRA-ML, through the samples, numpy", numpy_samples, 3, scale, note),
        _time("LoRA-ML, through the samples, PyTorch", torch_samples, 3, scale, note),
        _time("sufficient statistics of 3 x 5000 samples", lambda: sufficient_statistics(x, y), 21),
        _time("standard retraining, native, float64", lambda: retrain_standard(stats), 21),
    ]


def _other_trainers() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    truth = sample_problem(1, DIM, RANK, generator=generator).test_truth
    stats = sufficient_statistics(*sample_data(truth, 100, generator=generator))
    weight = truth - 0.3

    def tune() -> object:
        return finetune_lora(stats, weight, 1, steps=10000, truth=truth, generator=generator)

    return [_time("fine-tuning, 10000 steps with curve, native", tune, 21)]


def _many_trainings(threads: int) -> Row:
    generator = torch.Generator().manual_seed(2)
    problem = sample_problem(TASKS, DIM, RANK, batch_shape=(MANY,), generator=generator)
    stats = sufficient_statistics(*sample_data(problem.truths, 500, generator=generator))
    row = _time(
        f"LoRA-ML, {MANY} trainings at once, native",
        lambda: retrain_lora_ml(stats, RANK, generator=generator),
        5,
        threads=threads,
    )
    return Row(**{**row.__dict__, "note": f"{MANY / row.median:.0f} trainings a second"})


def _figure_1(threads: int) -> list[Row]:
    """All five sweeps with 5 trials, from drawing the data to the written run folder."""
    settings = LinearSettings()

    def compute() -> None:
        for point in settings.points():
            trials.run_point(point, settings)

    def everything() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            out = Path(folder) / "run"
            with RunFolder.create(out, settings, experiment=linear.EXPERIMENT) as run:
                linear.run(settings, run)

    assert figures.SHOWN_STEPS  # matplotlib's import is not part of the time
    return [
        _time("Figure 1: data, trainings and curves", compute, 3, threads=threads),
        _time("Figure 1: the same, run folder and six figures", everything, 3, threads=threads),
    ]


def _time(
    name: str,
    call: Callable[[], object],
    runs: int,
    scale: float = 1.0,
    note: str = "",
    threads: int = 1,
) -> Row:
    call()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        seconds.append(scale * (time.perf_counter() - begin))
    return Row(name, threads, statistics.median(seconds), min(seconds), max(seconds), runs, note)


def _table(rows: list[Row]) -> str:
    first = rows[0].median
    lines = [f"{'':48}{'threads':>8}{'median':>11}{'fastest':>11}{'slowest':>11}{'runs':>6}  "]
    for row in rows:
        note = row.note
        if row.name.startswith("LoRA-ML") and row is not rows[0] and "at once" not in row.name:
            note = "; ".join(filter(None, [f"{row.median / first:,.1f} x the first line", note]))
        times = "".join(f"{_seconds(t):>11}" for t in (row.median, row.fastest, row.slowest))
        lines.append(f"{row.name:48}{row.threads:>8}{times}{row.runs:>6}  {note}".rstrip())
    return "\n".join(lines)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def _through_samples_torch(x: Tensor, y: Tensor, factors: Tensor, steps: int) -> Tensor:
    weight = torch.zeros(DIM, DIM, dtype=x.dtype)
    u = list(factors)
    for _ in range(steps):
        total = torch.zeros_like(weight)
        for t in range(TASKS):
            for _ in range(INNER):
                r = (x[t] @ (weight + u[t] @ u[t].T).T - y[t]).T @ x[t]
                u[t] = u[t] - INNER_LR / SAMPLES * (r + r.T) @ u[t]
            total += (x[t] @ (weight + u[t] @ u[t].T).T - y[t]).T @ x[t]
        weight = weight - OUTER_LR / (SAMPLES * TASKS) * total
    return weight


def _through_samples_numpy(
    x: np.ndarray, y: np.ndarray, factors: np.ndarray, steps: int
) -> np.ndarray:
    weight = np.zeros((DIM, DIM))
    u = list(factors)
    for _ in range(steps):
        total = np.zeros_like(weight)
        for t in range(TASKS):
            for _ in range(INNER):
                r = (x[t] @ (weight + u[t] @ u[t].T).T - y[t]).T @ x[t]
                u[t] = u[t] - INNER_LR / SAMPLES * (r + r.T) @ u[t]
            total += (x[t] @ (weight + u[t] @ u[t].T).T - y[t]).T @ x[t]
        weight = weight - OUTER_LR / (SAMPLES * TASKS) * total
    return weight


if __name__ == "__main__":
    main()
