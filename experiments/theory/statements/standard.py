"""Statements 1 to 4 and 9: what standard retraining reaches, and what it leaves to fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.theory.checks import (
    Check,
    Outcome,
    all_of,
    at_least,
    at_most,
    exponent_equals,
    interval,
    mean_at_least,
    mean_equals,
)
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
    checks = []
    for tasks, rank, dim in ((2, 1, 5), (3, 1, 10), (10, 3, 20)):
        truths = sample_problem(tasks, dim, rank, batch_shape=(20,), generator=generator).truths
        predicted = standard_minimum(truths)
        start = 10 * torch.randn(predicted.shape, generator=generator, dtype=torch.float64)
        reached = standard(population_statistics(truths), initial_weight=start).weight
        at = f"T={tasks} k={rank} d={dim}"
        checks.append(
            at_most(
                f"relative distance of descent from Â_SR, {at}", _far(reached, predicted), 1e-12
            )
        )
    truths = sample_problem(3, 4, 1, generator=generator).truths
    weight = standard_minimum(truths)

    def objective(a: Tensor) -> Tensor:
        return (truths - a).square().sum() / 2

    slope = torch.autograd.functional.jacobian(objective, weight).abs().max()
    curved = torch.autograd.functional.hessian(objective, weight).reshape(16, 16)
    checks += [
        at_most("gradient at Â_SR by autograd", slope, 1e-12),
        at_least("smallest curvature of the loss by autograd (T = 3)", _lowest(curved), 3 - 1e-9),
    ]
    counts = [250, 1000, 4000, 16000]
    problem = sample_problem(3, 5, 1, batch_shape=(settings.draws(80),), generator=generator)
    distances = []
    for count in counts:
        stats = sample_statistics(problem.truths, count, noise=0.1, generator=generator)
        gap = standard(stats).weight - standard_minimum(problem.truths)
        # Relative to the spread of the truths, which is what the error is proportional to.
        distances.append(gap.norm(dim=(-2, -1)) / _spread(problem.truths))
    checks.append(
        exponent_equals(
            "exponent in N of the distance from Â_SR, N samples per task",
            *(counts, distances, -0.5, settings.within(0.05)),
        )
    )
    return Outcome(checks)


def standard_loss(settings: TheorySettings) -> Outcome:
    """Statement 2 (theorem 3.1): the expected loss at Â_SR is ½ (1 − 1/T) k d (d + 1)."""
    generator = settings.generator("2")
    grid = [(tasks, rank, 10) for rank in (1, 2) for tasks in (2, 3, 5, 10, 20)] + [(3, 3, 20)]
    checks, points = [], []
    for tasks, rank, dim in grid:
        drawn = _standard_losses(tasks, dim, rank, settings.draws(20000), generator)
        predicted = expected_standard_loss(tasks, dim, rank)
        what = f"mean loss at Â_SR, T={tasks} k={rank} d={dim}"
        checks.append(mean_equals(what, drawn, predicted, settings.within(0.03)))
        if dim == 10:
            mean, low, high = interval(drawn)
            points.append({"T": tasks, "k": rank, "d": dim, "mean": mean, "low": low, "high": high})
    return Outcome(checks, {"points": points})


def wrong_standard_loss(settings: TheorySettings) -> Outcome:
    """Control: theorem 3.1 without the diagonal's larger variance, ½ (1 − 1/T) k d²."""
    generator = settings.generator("wrong-2")
    drawn = _standard_losses(3, 10, 1, settings.draws(20000), generator)
    predicted = 0.5 * (1 - 1 / 3) * 10**2
    what = "mean loss at Â_SR, T=3 k=1 d=10"
    return Outcome([mean_equals(what, drawn, predicted, settings.within(0.03))])


def gap_rank(settings: TheorySettings) -> Outcome:
    """Statement 3 (proposition 1): Â_SR is k (T + 1) ranks away from the test task."""
    generator = settings.generator("3")
    checks = []
    for tasks, rank, dim in ((2, 1, 10), (9, 1, 10), (3, 2, 10), (4, 2, 10), (3, 3, 20)):
        problem = sample_problem(
            tasks, dim, rank, batch_shape=(settings.draws(2000),), generator=generator
        )
        gap = problem.test_truth - standard_minimum(problem.truths)
        needed = standard_gap_rank(tasks, dim, rank)
        found, ratio = numerical_rank(gap)
        size = gap.square().sum((-2, -1))
        at = f"T={tasks} k={rank} d={dim}"
        checks += [
            all_of(f"gap of rank k (T + 1) = {needed}, {at}", found == rank * (tasks + 1)),
            at_least(f"least ratio of singular values that shows it, {at}", ratio.min(), 1e3),
            at_least(
                f"least relative loss left by rank {needed - 1}, {at}",
                *((best_finetune_loss(gap, needed - 1) / size).min(), 1e-24),
            ),
            at_most(
                f"largest relative loss left by rank {needed}, {at}",
                *((best_finetune_loss(gap, needed) / size).max(), 1e-26),
            ),
        ]
    problem = sample_problem(3, 6, 1, batch_shape=(20,), generator=generator)
    weight = standard_minimum(problem.truths)
    stats = population_statistics(problem.test_truth)
    for rank in (1, 2, 3):
        tuned = finetune_lora(stats, weight, rank, steps=60000, generator=generator)
        left = best_finetune_loss(problem.test_truth - weight, rank)
        excess = tuned.losses[:, -1] / left - 1
        what = f"fine-tuning by descent with rank {rank} < 4: loss over the least possible, − 1"
        checks += [at_least(f"{what}, least", excess.min(), -1e-9)]
        checks += [at_most(f"{what}, largest", excess.max(), 1e-3)]
    return Outcome(checks)


def many_tasks(settings: TheorySettings) -> Outcome:
    """Statement 4 (proposition 2): Â_SR → A* + k I, and the loss of a rank r does not vanish."""
    generator = settings.generator("4")
    dim, rank = 10, 2
    counts = [10, 100, 1000, 10000]
    draws = settings.draws(200)
    limit = rank * torch.eye(dim, dtype=torch.float64)
    distances, points = [], []
    test = _adapters(dim, rank, 1, draws, generator)
    limit_loss = best_finetune_loss(test - limit, rank).mean()
    losses = torch.empty(0)
    for tasks in counts:
        mean = _mean_adapter(dim, rank, tasks, draws, generator)
        distances.append((mean - limit).norm(dim=(-2, -1)))
        losses = best_finetune_loss(test - mean, rank)
        points.append({"T": tasks, "distance": float(distances[-1].mean())})
    bound = many_task_loss_bound(dim, rank, rank)
    checks = [
        exponent_equals(
            "exponent in T of ‖Â_SR − A* − k I‖, k=2 d=10",
            *(counts, distances, -0.5, settings.within(0.03)),
        ),
        mean_at_least(f"mean loss left by rank k at T={counts[-1]}, k=2 d=10", losses, bound),
        at_most(
            "its relative distance from the limit's mean",
            _relative(losses.mean(), limit_loss),
            0.02,
        ),
    ]
    for d, k in ((10, 2), (10, 1), (20, 3)):
        gap = _adapters(d, k, 1, settings.draws(2000), generator) - k * torch.eye(d)
        room = [
            (best_finetune_loss(gap, r) - many_task_loss_bound(d, k, r)).min() for r in range(d + 1)
        ]
        checks.append(
            at_least(f"least loss minus bound in the limit, all r, k={k} d={d}", min(room), -1e-12)
        )
    return Outcome(checks, {"points": points})


def asymmetric(settings: TheorySettings) -> Outcome:
    """Statement 9 (appendix C): the same limits of standard retraining with adapters U_t V_tᵀ.

    The entries of U_t and V_t have correlation ρ; the mean adapter is ρ k I.
    """
    generator = settings.generator("9")
    dim, rank, tasks = 10, 2, 3
    checks: list[Check] = []
    for rho in (0.0, 0.5, 1.0):
        losses = _standard_losses(tasks, dim, rank, settings.draws(20000), generator, rho)
        predicted = expected_standard_loss(tasks, dim, rank, rho)
        at = f"ρ={rho:g}"
        checks.append(
            mean_equals(f"mean loss at Â_SR, {at}", losses, predicted, settings.within(0.03))
        )
        drawn = _adapters(dim, rank, tasks + 1, settings.draws(2000), generator, rho)
        gap = drawn[:, -1] - standard_minimum(drawn[:, :-1])
        found, _ = numerical_rank(gap)
        checks.append(
            all_of(f"gap of rank k (T + 1) = 8, {at}", found == standard_gap_rank(tasks, dim, rank))
        )
        counts = [10, 100, 1000]
        limit = rho * rank * torch.eye(dim, dtype=torch.float64)
        means = [_mean_adapter(dim, rank, t, settings.draws(300), generator, rho) for t in counts]
        distances = [(mean - limit).norm(dim=(-2, -1)) for mean in means]
        checks.append(
            exponent_equals(
                f"exponent in T of ‖Â_SR − A* − mean adapter‖, {at}",
                *(counts, distances, -0.5, settings.within(0.03)),
            )
        )
        room = [
            (
                best_finetune_loss(drawn[:, -1] - limit, r)
                - many_task_loss_bound(dim, rank, r, rho)
            ).min()
            for r in range(dim + 1)
        ]
        checks.append(
            at_least(f"least loss minus bound in the limit, all r, {at}", min(room), -1e-12)
        )
    return Outcome(checks)


def _standard_losses(
    tasks: int,
    dim: int,
    rank: int,
    draws: int,
    generator: torch.Generator,
    correlation: float = 1.0,
) -> Tensor:
    """(1/T) Σ L*_t(Â_SR) of so many problems, [draws]; A* cancels."""
    parts = []
    for begin in range(0, draws, _AT_ONCE):
        size = min(_AT_ONCE, draws - begin)
        truths = _adapters(dim, rank, tasks, size, generator, correlation)
        gaps = truths - standard_minimum(truths).unsqueeze(-3)
        parts.append(gaps.square().sum((-2, -1)).mean(-1) / 2)
    return torch.cat(parts)


def _adapters(
    dim: int,
    rank: int,
    tasks: int,
    draws: int,
    generator: torch.Generator,
    correlation: float = 1.0,
) -> Tensor:
    """U_t V_tᵀ, [draws, tasks, d, d], or [draws, d, d] of one task."""
    u, v = _pair((draws, tasks, dim, rank), generator, correlation)
    return (u @ v.mT).squeeze(1) if tasks == 1 else u @ v.mT


def _mean_adapter(
    dim: int,
    rank: int,
    tasks: int,
    draws: int,
    generator: torch.Generator,
    correlation: float = 1.0,
) -> Tensor:
    """mean_t U_t V_tᵀ, [draws, d, d], as one product of the factors side by side."""
    means = []
    for _ in range(draws):
        u, v = _pair((dim, rank * tasks), generator, correlation)
        means.append(u @ v.mT / tasks)
    return torch.stack(means)


def _pair(
    shape: tuple[int, ...], generator: torch.Generator, correlation: float
) -> tuple[Tensor, Tensor]:
    u = torch.randn(shape, generator=generator, dtype=torch.float64)
    if correlation == 1:
        return u, u
    other = torch.randn(shape, generator=generator, dtype=torch.float64)
    return u, correlation * u + (1 - correlation**2) ** 0.5 * other


def _far(reached: Tensor, predicted: Tensor) -> Tensor:
    return ((reached - predicted).norm(dim=(-2, -1)) / predicted.norm(dim=(-2, -1))).max()


def _spread(truths: Tensor) -> Tensor:
    return (truths - truths.mean(-3, keepdim=True)).flatten(-3).norm(dim=-1)


def _lowest(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(matrix)[0]


def _relative(value: Tensor, other: Tensor) -> Tensor:
    return ((value - other) / other).abs()
