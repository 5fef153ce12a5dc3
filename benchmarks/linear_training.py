"""Times the linear model's trainings beside plain PyTorch and loops through the samples.

python -m benchmarks.linear_training [--threads N] [--device cuda] [--write DIR]
python -m benchmarks.linear_training --cases figure-1 --precisions fp64 --write DIR

One training is the paper's: d = 10, T = 3, k = 1, N = 5000, 3000 outer steps of 10 inner ones each,
or 10000 steps of fine-tuning on n = 100. Versions that go through the samples run a few steps only;
their times are scaled to all of them. Figure 1 is all five sweeps with 5 trials, from drawing the
data to the curves, or to the written run folder with its figures.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark, Candidate, Case, Options, Precision
from benchmarks.lib.gate import check_parts
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, OperatorCase, Setup
from benchmarks.lib.trainings import TrainingCase, Version, by_reference
from experiments.synthetic.linear.run import LINEAR
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.linear.trials import run_point
from experiments.synthetic.settings import Point
from metalora.linear import (
    finetune_lora,
    lora_ml,
    sample_data,
    sample_problem,
    sample_statistics,
    standard,
    sufficient_statistics,
)

SETTINGS = LinearSettings()
INNER, OUTER_LR, INNER_LR, FINETUNE_LR = 10, 0.03, 0.003, 0.005
SHORT = 5  # steps of the versions that go through the samples
LOOPS: dict[str, Callable[[Tensor], Any]] = {
    "samples-numpy": Tensor.numpy,
    "samples-PyTorch": Tensor.detach,
}


class Problem:
    """The start of trainings at one setting of Figure 1; a single one has its samples as well."""

    def __init__(
        self, point: Point, trainings: int, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.point = point
        generator = torch.Generator().manual_seed(3)
        sizes = point.num_tasks, point.dim, point.rank
        problem = sample_problem(*sizes, batch_shape=(trainings,), generator=generator)
        truths = (
            (problem.truths, point.retrain_samples),
            (problem.test_truth, point.finetune_samples),
        )
        if trainings == 1:
            data = [sample_data(truth, count, generator=generator) for truth, count in truths]
            self.samples = [(x[0].to(dtype), y[0].to(dtype)) for x, y in data]
            statistics = [sufficient_statistics(x, y) for x, y in data]
        else:
            statistics = [sample_statistics(*each, generator=generator) for each in truths]
        self.stats, self.few = (s.to(device, dtype) for s in statistics)

        def start(*shape: int) -> Tensor:
            drawn = torch.randn(trainings, *shape, generator=generator, dtype=torch.float64)
            return 0.1 * drawn.to(device, dtype)

        self.factors = start(point.num_tasks, point.dim, point.rank)
        self.u, self.v = (start(point.dim, point.finetune_rank) for _ in range(2))
        self.zero = torch.zeros_like(self.u[:, :, :1]).expand(-1, -1, point.dim).contiguous()
        self.truth = problem.test_truth.to(device, dtype)

    def metalora(self, method: str, steps: int) -> Tensor:
        """The weights, or in fine-tuning the last prediction error, one row a training."""
        if method == "lora_ml":
            rank, start = self.point.rank, self.factors
            found = lora_ml(self.stats, rank, outer_steps=steps, initial_factors=start)
            return found.weight.flatten(1)
        if method == "standard":
            return standard(self.stats, steps=steps).weight.flatten(1)
        errors = finetune_lora(
            self.few,
            self.zero,
            self.point.finetune_rank,
            steps=steps,
            initial_factors=(self.u, self.v),
            truth=self.truth,
        ).errors
        assert errors is not None
        return errors[:, -1:]

    def loop(self, method: str, library: str, steps: int) -> Tensor:
        """The same through the samples of the one training at every step."""
        tensors = [*self.samples[method == "finetune_lora"], self.zero[0]]
        if method == "lora_ml":
            tensors.append(self.factors[0])
        elif method == "finetune_lora":
            tensors += [self.u[0], self.v[0], self.truth[0]]
        found = METHODS[method](*map(LOOPS[library], tensors), steps=steps)
        return torch.as_tensor(found).reshape(1, -1)


def loop_lora_ml(x: Any, y: Any, weight: Any, factors: Any, steps: int) -> Any:
    """LoRA-ML through the samples x, y [T, N, d] at every step; torch tensors or numpy arrays."""
    tasks, count, _ = x.shape
    u = list(factors)
    for _ in range(steps):
        total = 0 * weight
        for t in range(tasks):
            for _ in range(INNER):
                r = _gradient(x[t], y[t], weight + u[t] @ u[t].T)
                u[t] = u[t] - INNER_LR / count * (r + r.T) @ u[t]
            total = total + _gradient(x[t], y[t], weight + u[t] @ u[t].T)
        weight = weight - OUTER_LR / (count * tasks) * total
    return weight


def loop_standard(x: Any, y: Any, weight: Any, steps: int) -> Any:
    """Standard retraining in the same way."""
    tasks, count, _ = x.shape
    for _ in range(steps):
        total = sum(_gradient(x[t], y[t], weight) for t in range(tasks))
        weight = weight - OUTER_LR / (count * tasks) * total
    return weight


def loop_finetune(x: Any, y: Any, weight: Any, u: Any, v: Any, truth: Any, steps: int) -> Any:
    """Fine-tuning on x, y [n, d] in the same way, with its curve; the last prediction error."""
    errors = []
    for _ in range(steps):
        r = _gradient(x, y, weight + u @ v.T)
        u, v = u - FINETUNE_LR / len(x) * r @ v, v - FINETUNE_LR / len(x) * r.T @ u
        errors.append(((x @ (weight + u @ v.T - truth).T) ** 2).sum())
    return errors[-1]


def _gradient(x: Any, y: Any, weight: Any) -> Any:
    """N times the gradient of a task's loss in its weight: (W x - y) x, summed over samples."""
    return (x @ weight.T - y).T @ x


METHODS: dict[str, Callable[..., Any]] = {
    "lora_ml": loop_lora_ml,
    "standard": loop_standard,
    "finetune_lora": loop_finetune,
}


@dataclass(frozen=True)
class LinearCase(TrainingCase):
    """Trainings at the setting of Figure 1 with k = 1."""

    def offered(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if n in ("metalora", "reference") or self._loops(n)]

    def _loops(self, name: str) -> bool:
        return name in LOOPS and self.trainings == 1

    def versions(self, dtype: torch.dtype, device: str) -> Mapping[str, Version]:
        point = next(point for point in SETTINGS.points() if point.name == "k=1")
        if self.trainings > 1:  # a step takes as long, but drawing the data would not
            point = replace(point, retrain_samples=500)
        problem = Problem(point, self.trainings, dtype, device)
        run = partial(problem.metalora, self.method)
        found = {
            "metalora": Version(run, trainings=self.trainings),
            "reference": Version(by_reference(run), 50, self.trainings),
        }
        for name in filter(self._loops, LOOPS if device == "cpu" else ()):
            found[name] = Version(partial(problem.loop, self.method, name), SHORT)
        return found

    def shrunk(self) -> LinearCase:
        return replace(self, trainings=min(2, self.trainings), steps=30)


def _statistics(setup: Setup) -> Function:
    def gram_and_cross(x: Tensor, y: Tensor) -> Tensor:
        found = sufficient_statistics(x, y)
        return torch.cat([found.gram, found.cross], 1)

    return gram_and_cross


def _plain_statistics(x: Tensor, y: Tensor) -> Tensor:
    return torch.cat([x.mT @ x, y.mT @ x], 1)


@dataclass(frozen=True)
class Figure1Case(Case):
    """All of Figure 1, by metalora, with its run folder and figures, and through the samples."""

    settings: LinearSettings = SETTINGS

    def offered(self, names: Sequence[str]) -> list[str]:
        return [n for n in names if n in ("metalora", "metalora-with-figures", *LOOPS)]

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        settings = self.settings
        problems = [Problem(point, 1, torch.float64) for point in settings.points()]

        def compute() -> None:
            for point in settings.points():
                run_point(point, settings)

        def everything() -> None:
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                LINEAR.run(replace(settings, out=Path(folder) / "run"))

        def make(name: str) -> Candidate:
            if name not in LOOPS:
                return Candidate([{"all": compute if name == "metalora" else everything}], 0.0)
            steps, scales, error = {}, {}, 0.0
            for problem in problems:
                counts = self.counts(problem.point)
                for method, count in counts.items():
                    step = f"{method}, {problem.point.name}"
                    steps[step] = partial(problem.loop, method, name, SHORT)
                    scales[step] = count / SHORT
                    exact = problem.metalora(method, SHORT)
                    found = check_parts(f"{name}, {step}", steps[step](), exact, 1e-10)
                    error = max(error, found)
            return Candidate([steps], error, scales, note=f"{SHORT} steps of each method timed")

        return make

    def counts(self, point: Point) -> dict[str, int]:
        """How many steps of each method there are at a setting; fine-tuning follows both others."""
        s = self.settings
        finetuning = 2 * point.finetune_steps
        counts = {"lora_ml": s.outer_steps, "standard": s.outer_steps, "finetune_lora": finetuning}
        return {method: s.trials * count for method, count in counts.items()}

    def shrunk(self) -> Figure1Case:
        few = replace(self.settings, trials=1, outer_steps=20, finetune_steps=20)
        return replace(self, settings=few)


BENCHMARK = Benchmark(
    "linear_training",
    "The linear model: one training",
    (
        LinearCase("linear.lora_ml", "cpu", "LoRA-ML", 1, 3000),
        LinearCase("linear.standard", "cpu", "standard retraining", 1, 3000),
        LinearCase("linear.finetune_lora", "cpu", "fine-tuning", 1, 10000),
        LinearCase("linear.lora_ml", "cpu", "LoRA-ML, 64 at once", 64, 3000, most_rounds=5),
        OperatorCase(
            "linear.sufficient_statistics",
            "cpu",
            "sufficient statistics, 3 x 5000 samples",
            {"x": (3, 5000, 10), "y": (3, 5000, 10)},
            {"metalora": _statistics, "reference": lambda setup: _plain_statistics},
            _plain_statistics,
        ),
        *(
            LinearCase(
                f"linear.{method}", "cuda", f"{name}, 8192 at once", 8192, steps, most_rounds=5
            )
            for method, name, steps in (
                ("lora_ml", "LoRA-ML", 3000),
                ("standard", "standard retraining", 3000),
                ("finetune_lora", "fine-tuning", 10000),
            )
        ),
        Figure1Case("linear", "figure-1", "Figure 1", once=True),
    ),
    {"all": ("metalora", "metalora-with-figures", "reference", *LOOPS)},
    floor="metalora",
    precisions=("fp64", "fp32"),
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
