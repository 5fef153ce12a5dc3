"""Statements 1 to 4 and 9: what standard retraining reaches, and what it leaves to fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.theory.checks import Checks, Outcome, interval
from experiments.theory.settings import TheorySettings
from metalora.linear import finetune_lora, sample_problem, sample_statistics, standard
from metalora.linear.theory import (
    best_finetune_loss,
    expected_standard_loss,
    many_task_loss_bound,
    numerical_rank,
    population_statistics,
    standard_gap_rank,
    standard_minimum,
)

_AT_ONCE = 4000  # problems drawn at a time


def standard_retraining(settings: TheorySettings) -> Outcome:
    """Statement 1 (eq. 12): Â_SR = A* + mean R_t is the unique minimiser of standard retraining."""
    generator = settings.generator("1")
    checks = Checks()
    for tasks, rank, dim in ((2, 1, 5), (3, 1, 10), (10, 3, 20)):
        truths = sample_problem(tasks, dim, rank, batch_shape=(20,), generator=generator).truths
        predicted = standard_minimum(truths)
        start = 10 * torch.randn(predicted.shape, generator=generator, dtype=torch.float64)
        reached = standard(population_statistics(truths), initial_weight=start).weight
        far = (reached - predicted).norm(dim=(-2, -1)) / predicted.norm(dim=(-2, -1))
        checks.at = f"T={tasks} k={rank} d={dim}"
        checks.at_most("relative distance of descent from Â_SR", far.max(), 1e-12)
    checks.at = ""
    truths = sample_problem(3, 4, 1, generator=generator).truths
    weight = standard_minimum(truths)

    def objective(a: Tensor) -> Tensor:
        return (truths - a).square().sum() / 2

    slope = torch.autograd.functional.jacobian(objective, weight).abs().max()
    curved = torch.autograd.functional.hessian(objective, weight).reshape(16, 16)
    lowest = torch.linalg.eigvalsh(curved)[0]
    checks.at_most("gradient at Â_SR by autograd", slope, 1e-12)
    checks.at_least("smallest curvature of the loss by autograd (T = 3)", lowest, 3 - 1e-9)
    counts = [250, 1000, 4000, 16000]
    problem = sample_problem(3, 5, 1, batch_shape=(settings.draws(80),), generator=generator)
    spread = (problem.truths - problem.truths.mean(-3, keepdim=True)).flatten(-3).norm(dim=-1)
    distances = []
    for count in counts:
        stats = sample_statistics(problem.truths, count, noise=0.1, generator=generator)
        gap = standard(stats).weight - standard_minimum(problem.truths)
        # Relative to the spread of the truths, which is what the error is proportional to.
        distances.append(gap.norm(dim=(-2, -1)) / spread)
    what = "exponent in N of the distance from Â_SR, N samples per task"
    checks.exponent_equals(what, counts, distances, -0.5, settings.within(0.05))
    return Outcome(checks)


def standard_loss(settings: TheorySettings) -> Outcome:
    """Statement 2 (theorem 3.1): the expected loss at Â_SR is ½ (1 − 1/T) k d (d + 1)."""
    generator = settings.generator("2")
    grid = [(tasks, rank, 10) for rank in (1, 2) for tasks in (2, 3, 5, 10, 20)] + [(3, 3, 20)]
    checks, points = Checks(), []
    for tasks, rank, dim in grid:
        drawn = _Adapters(dim, rank, generator).standard_losses(tasks, settings.draws(20000))
        predicted = expected_standard_loss(tasks, dim, rank)
        checks.at = f"T={tasks} k={rank} d={dim}"
        checks.mean_equals("mean loss at Â_SR", drawn, predicted, settings.within(0.03))
        if dim == 10:
            mean, low, high = interval(drawn)
            points.append({"T": tasks, "k": rank, "d": dim, "mean": mean, "low": low, "high": high})
    return Outcome(checks, {"points": points})


def wrong_standard_loss(settings: TheorySettings) -> Outcome:
    """Control: theorem 3.1 without the diagonal's larger variance, ½ (1 − 1/T) k d²."""
    adapters = _Adapters(10, 1, settings.generator("wrong-2"))
    drawn = adapters.standard_losses(3, settings.draws(20000))
    predicted, within = 0.5 * (1 - 1 / 3) * 10**2, settings.within(0.03)
    checks = Checks()
    checks.mean_equals("mean loss at Â_SR, T=3 k=1 d=10", drawn, predicted, within)
    return Outcome(checks)


def gap_rank(settings: TheorySettings) -> Outcome:
    """Statement 3 (proposition 1): Â_SR is k (T + 1) ranks away from the test task."""
    generator = settings.generator("3")
    checks = Checks()
    for tasks, rank, dim in ((2, 1, 10), (9, 1, 10), (3, 2, 10), (4, 2, 10), (3, 3, 20)):
        shape = (settings.draws(2000),)
        problem = sample_problem(tasks, dim, rank, batch_shape=shape, generator=generator)
        gap = problem.test_truth - standard_minimum(problem.truths)
        needed = standard_gap_rank(tasks, dim, rank)
        found, ratio = numerical_rank(gap)
        with_less, with_all = (relative_loss_left(gap, r) for r in (needed - 1, needed))
        checks.at = f"T={tasks} k={rank} d={dim}"
        checks.all_of(f"gap of rank k (T + 1) = {needed}", found == rank * (tasks + 1))
        checks.at_least("least ratio of singular values that shows it", ratio.min(), 1e3)
        checks.at_least(f"least relative loss left by rank {needed - 1}", with_less.min(), 1e-24)
        checks.at_most(f"largest relative loss left by rank {needed}", with_all.max(), 1e-26)
    checks.at = ""
    problem = sample_problem(3, 6, 1, batch_shape=(20,), generator=generator)
    weight = standard_minimum(problem.truths)
    stats = population_statistics(problem.test_truth)
    for rank in (1, 2, 3):
        tuned = finetune_lora(stats, weight, rank, steps=60000, generator=generator)
        left = best_finetune_loss(problem.test_truth - weight, rank)
        excess = tuned.losses[:, -1] / left - 1
        what = f"fine-tuning by descent with rank {rank} < 4: loss over the least possible, − 1"
        checks.at_least(f"{what}, least", excess.min(), -1e-9)
        checks.at_most(f"{what}, largest", excess.max(), 1e-3)
    return Outcome(checks)


def many_tasks(settings: TheorySettings) -> Outcome:
    """Statement 4 (proposition 2): Â_SR → A* + k I, and the loss of a rank r does not vanish."""
    generator = settings.generator("4")
    dim, rank, draws = 10, 2, settings.draws(200)
    adapters = _Adapters(dim, rank, generator)
    counts = [10, 100, 1000, 10000]
    limit = rank * torch.eye(dim, dtype=torch.float64)
    test = adapters.draw(1, draws)
    means = [adapters.means(tasks, draws) for tasks in counts]
    distances = [(mean - limit).norm(dim=(-2, -1)) for mean in means]
    losses = best_finetune_loss(test - means[-1], rank)
    expected = best_finetune_loss(test - limit, rank).mean()
    off = ((losses.mean() - expected) / expected).abs()
    checks = Checks()
    what = "exponent in T of ‖Â_SR − A* − k I‖, k=2 d=10"
    checks.exponent_equals(what, counts, distances, -0.5, settings.within(0.03))
    what = f"mean loss left by rank k at T={counts[-1]}, k=2 d=10"
    checks.mean_at_least(what, losses, many_task_loss_bound(dim, rank, rank))
    checks.at_most("its relative distance from the limit's mean", off, 0.02)
    for d, k in ((10, 2), (10, 1), (20, 3)):
        gap = _Adapters(d, k, generator).draw(1, settings.draws(2000)) - k * torch.eye(d)
        checks.at = f"k={k} d={d}"
        checks.at_least(
            "least loss minus bound in the limit, all r", _least_above_bound(gap, k), -1e-12
        )
    points = [
        {"T": tasks, "distance": float(distance.mean())}
        for tasks, distance in zip(counts, distances, strict=True)
    ]
    return Outcome(checks, {"points": points})


def asymmetric(settings: TheorySettings) -> Outcome:
    """Statement 9 (appendix C): the same limits of standard retraining with adapters U_t V_tᵀ.

    The entries of U_t and V_t have correlation ρ; the mean adapter is ρ k I.
    """
    generator = settings.generator("9")
    dim, rank, tasks, counts = 10, 2, 3, [10, 100, 1000]
    within = settings.within(0.03)
    checks = Checks()
    for rho in (0.0, 0.5, 1.0):
        adapters = _Adapters(dim, rank, generator, rho)
        checks.at = f"ρ={rho:g}"
        losses = adapters.standard_losses(tasks, settings.draws(20000))
        predicted = expected_standard_loss(tasks, dim, rank, rho)
        checks.mean_equals("mean loss at Â_SR", losses, predicted, within)
        drawn = adapters.draw(tasks + 1, settings.draws(2000))
        found, _ = numerical_rank(drawn[:, -1] - standard_minimum(drawn[:, :-1]))
        needed = standard_gap_rank(tasks, dim, rank)
        checks.all_of("gap of rank k (T + 1) = 8", found == needed)
        limit = rho * rank * torch.eye(dim, dtype=torch.float64)
        means = [adapters.means(count, settings.draws(300)) for count in counts]
        distances = [(mean - limit).norm(dim=(-2, -1)) for mean in means]
        what = "exponent in T of ‖Â_SR − A* − mean adapter‖"
        checks.exponent_equals(what, counts, distances, -0.5, within)
        room = _least_above_bound(drawn[:, -1] - limit, rank, rho)
        checks.at_least("least loss minus bound in the limit, all r", room, -1e-12)
    return Outcome(checks)


def relative_loss_left(gap: Tensor, rank: int) -> Tensor:
    """Returns the loss that the best adapter of a rank leaves of gaps [..., d, d], over ‖gap‖²."""
    return best_finetune_loss(gap, rank) / gap.square().sum((-2, -1))


def _least_above_bound(gap: Tensor, rank: int, correlation: float = 1.0) -> Tensor:
    """Returns the least loss of any rank r over gaps [draws, d, d], minus proposition 2's bound."""
    dim = gap.shape[-1]
    bounds = [many_task_loss_bound(dim, rank, r, correlation) for r in range(dim + 1)]
    return min((best_finetune_loss(gap, r) - bound).min() for r, bound in enumerate(bounds))


@dataclass(frozen=True)
class _Adapters:
    """Random U_t V_tᵀ, d x d of rank k; A* is zero, since it cancels in all that is measured.

    Attributes:
        dim: d.
        rank: k.
        generator: what draws them.
        correlation: of the entries of U_t with those of V_t; 1 makes them equal.
    """

    dim: int
    rank: int
    generator: torch.Generator
    correlation: float = 1.0

    def draw(self, tasks: int, draws: int) -> Tensor:
        """Draws U_t V_tᵀ, [draws, tasks, d, d], or [draws, d, d] of one task."""
        u, v = self._factors(draws, tasks, self.dim, self.rank)
        return (u @ v.mT).squeeze(1) if tasks == 1 else u @ v.mT

    def means(self, tasks: int, draws: int) -> Tensor:
        """Draws mean_t U_t V_tᵀ, [draws, d, d], each as one product of the factors side by side."""
        pairs = (self._factors(self.dim, self.rank * tasks) for _ in range(draws))
        return torch.stack([u @ v.mT / tasks for u, v in pairs])

    def standard_losses(self, tasks: int, draws: int) -> Tensor:
        """Returns (1/T) Σ L*_t(Â_SR) of ``draws`` problems, [draws]."""
        parts = []
        for begin in range(0, draws, _AT_ONCE):
            truths = self.draw(tasks, min(_AT_ONCE, draws - begin))
            gaps = truths - standard_minimum(truths).unsqueeze(-3)
            parts.append(gaps.square().sum((-2, -1)).mean(-1) / 2)
        return torch.cat(parts)

    def _factors(self, *shape: int) -> tuple[Tensor, Tensor]:
        u = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.correlation == 1:
            return u, u
        other = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return u, self.correlation * u + (1 - self.correlation**2) ** 0.5 * other
