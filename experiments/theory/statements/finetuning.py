"""Statement 8: how fine-tuning's error grows with noise, dimension, rank, samples and tasks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.theory.checks import Checks, Outcome, interval
from experiments.theory.settings import TheorySettings
from experiments.theory.statements.recovery import zero_losses
from metalora.linear import finetune_lora, prediction_error, sample_problem, sample_statistics
from metalora.linear.theory import best_adapted_weight, expected_finetune_error, standard_minimum


@dataclass(frozen=True)
class _Setting:
    """Method, T, k, d, n, σ, and the rank r of fine-tuning; None is the rank that the gap has."""

    method: str
    tasks: int
    rank: int
    dim: int
    samples: int
    noise: float
    finetune_rank: int | None = None

    @property
    def needed(self) -> int:
        if self.finetune_rank is not None:
            return self.finetune_rank
        if self.method == "standard":
            return self.rank * (self.tasks + 1)
        return self.rank if self.tasks >= 3 else 3 * self.rank

    @property
    def name(self) -> str:
        return (
            f"{self.method} T={self.tasks} k={self.rank} r={self.needed} d={self.dim} "
            f"n={self.samples}"
        )


def finetuning_error(settings: TheorySettings) -> Outcome:
    """Statement 8 (lemma 1, corollaries 2 and 4): the error grows like σ² r d / n.

    r is k after LoRA-ML with T >= 3, 3k after LoRA-ML with T = 2, and k (T + 1) after standard
    retraining, which so gets worse with more tasks. On the samples' own inputs the error is
    σ² r (2d − r), the lemma's r d up to a factor; the exponents are compared with those of r d.
    """
    generator = settings.generator("8")
    retrained = _Retrained(settings, generator)
    lora = _Setting("lora-ml", 5, 1, 10, 1000, settings.noise)
    # Two tasks' gap may have a small singular value; the first order in σ needs it above the noise.
    two = dataclasses.replace(lora, tasks=2, noise=settings.noise / 20)
    standard = dataclasses.replace(lora, method="standard", tasks=3)
    short = dataclasses.replace(standard, finetune_rank=1)
    many = dataclasses.replace(standard, dim=40)
    wide = dataclasses.replace(lora, dim=20)
    samples, tasks = [250, 1000, 4000], [1, 2, 4, 8]
    series: list[tuple[str, str, _Setting, Sequence[float], float, float]] = [
        ("n", "samples", lora, samples, -1.0, 0.08),
        ("n", "samples", two, samples, -1.0, 0.08),
        ("n", "samples", standard, samples, -1.0, 0.08),
        ("n, rank k too small", "samples", short, samples, 0.0, 0.15),
        ("σ", "noise", lora, [settings.noise * f for f in (0.5, 1.0, 2.0)], 2.0, 0.12),
        ("d", "dim", lora, [8, 16, 32], 1.0, 0.15),
        ("r = k", "rank", wide, [1, 2, 4], 1.0, 0.12),
        ("r = 3k", "rank", dataclasses.replace(two, dim=24), [1, 2, 3], 1.0, 0.2),
        ("T + 1", "tasks", many, tasks, 1.0, 0.12),
        ("T", "tasks", wide, [3, 5, 8], 0.0, 0.12),
    ]
    checks, points = Checks(), []
    exact: dict[str, tuple[Tensor, float]] = {}
    for name, field, base, values, predicted, within in series:
        errors = []
        for value in values:
            at = dataclasses.replace(base, **{field: value})  # type: ignore[arg-type]
            own, fresh = _errors(at, retrained, generator)
            errors.append(fresh)
            mean, low, high = interval(fresh)
            points.append(
                {"over": field, **dataclasses.asdict(at), "finetune_rank": at.needed}
                | {"mean": mean, "low": low, "high": high}
            )
            if at.finetune_rank is None:
                expected = expected_finetune_error(at.dim, at.needed, at.noise)
                what = f"mean ‖X(W − M)ᵀ‖²/σ², {at.name} σ={at.noise:g}"
                exact[what] = own / at.noise**2, expected / at.noise**2
        abscissa = [v + 1 for v in values] if name == "T + 1" else list(values)
        what = f"exponent in {name} of ‖W − M‖² ({base.method}, T={base.tasks})"
        checks.exponent_equals(what, abscissa, errors, predicted, settings.within(within))
    for what, (own, expected) in exact.items():
        checks.mean_equals(what, own, expected, settings.within(0.1))
    what = f"largest relative difference of descent's error, {lora.name}"
    checks.at_most(what, _off_by_descent(lora, retrained, generator), 1e-6)
    return Outcome(checks, {"points": points})


class _Retrained:
    """Problems and the weights that each method ends with on their population losses, kept."""

    def __init__(self, settings: TheorySettings, generator: torch.Generator):
        self.settings = settings
        self.draws = settings.draws(400)
        self.generator = generator
        self.made: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def __call__(self, at: _Setting) -> tuple[Tensor, Tensor]:
        """Returns the test tasks' truths and the retrained weights, [problems, d, d] each."""
        key = at.method, at.tasks, at.rank, at.dim
        if key not in self.made:
            self.made[key] = self._make(at)
        return self.made[key]

    def _make(self, at: _Setting) -> tuple[Tensor, Tensor]:
        # Standard retraining costs nothing: a problem per draw. LoRA-ML leaves a gap of exact rank
        # on every problem, so that errors differ between its problems only as between samples.
        count = self.draws if at.method == "standard" else self.settings.draws(24)
        problem = sample_problem(
            at.tasks, at.dim, at.rank, batch_shape=(count,), generator=self.generator
        )
        if at.method == "standard":
            return problem.test_truth, standard_minimum(problem.truths)
        weight, _, zero = zero_losses(problem, self.settings, self.generator)
        return problem.test_truth[zero], weight[zero]


def _errors(
    at: _Setting, retrained: _Retrained, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Returns ‖X(W − M)ᵀ‖_F² on the samples' own inputs and ‖W − M‖_F², [draws] each."""
    truth, weight = retrained(at)
    repeats = -(-retrained.draws // len(weight))
    truth = truth.expand(repeats, *weight.shape).contiguous()
    start = weight.expand(truth.shape).contiguous()
    stats = sample_statistics(truth, at.samples, noise=at.noise, generator=generator)
    adapted = best_adapted_weight(stats, start, at.needed)
    own = prediction_error(stats, adapted, truth)
    return own.flatten(), (adapted - truth).square().sum((-2, -1)).flatten()


def _off_by_descent(at: _Setting, retrained: _Retrained, generator: torch.Generator) -> Tensor:
    """Returns how far gradient descent's error is from the minimiser's, relative to the latter."""
    truth, weight = retrained(at)
    stats = sample_statistics(truth, at.samples, noise=at.noise, generator=generator)
    best = prediction_error(stats, best_adapted_weight(stats, weight, at.needed), truth)
    tuned = finetune_lora(stats, weight, at.needed, steps=20000, truth=truth, generator=generator)
    assert tuned.errors is not None
    return (tuned.errors[:, -1] / best - 1).abs().max()
