"""Statements 5, 6, 10 and 12: what LoRA-ML's zero loss means, and that descent reaches it."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.theory.checks import Checks, Outcome
from experiments.theory.settings import TheorySettings
from experiments.theory.statements.standard import relative_loss_left
from metalora.linear import LinearProblem, finetune_lora, lora_ml, sample_problem
from metalora.linear.theory import (
    base_gap_rank,
    best_weight,
    find_critical_points,
    loss,
    numerical_rank,
    population_statistics,
    reduced_loss,
    solution_dimension,
    two_task_minima,
)

_ZERO = 1e-20  # a loss below this part of the truths' own size counts as zero
_TRAINED = 1e-8  # singular values up to this part of the largest count as zero


def base_gap(settings: TheorySettings) -> Outcome:
    """Statement 5 (theorem 3.2, corollary 1): L = 0 leaves rank(A − A*) <= 2k, and 3k suffices."""
    generator = settings.generator("5")
    checks = Checks()
    for tasks, rank, dim in ((1, 1, 6), (2, 1, 10), (2, 2, 8), (2, 3, 12)):
        shape = (settings.draws(80),)
        problem = sample_problem(tasks, dim, rank, batch_shape=shape, generator=generator)
        weight, _, zero = zero_losses(problem, settings, generator)
        found, ratio = numerical_rank((weight - problem.base)[zero], _TRAINED)
        allowed = base_gap_rank(tasks, dim, rank)
        needed = allowed + rank
        gap = (problem.test_truth - weight)[zero]
        with_all, with_less = (relative_loss_left(gap, r) for r in (needed, needed - 1))
        checks.at = f"T={tasks} k={rank} d={dim}"
        checks.all_of(f"rank(A − A*) = 2k = {allowed} where L = 0", found == allowed, 8)
        checks.at_least("least ratio of singular values that shows it", ratio.min(), 1e3)
        what = f"largest relative loss that rank 3k = {needed} leaves on the test task"
        checks.at_most(what, with_all.max(), 1e-16)
        what = f"least relative loss that rank {needed - 1} leaves"
        checks.at_least(what, with_less.min(), 1e-12)
        if (tasks, rank) == (2, 1):
            stats = population_statistics(problem.test_truth[zero])
            tuned = finetune_lora(stats, weight[zero], needed, steps=60000, generator=generator)
            final = (tuned.losses[:, -1] / gap.square().sum((-2, -1))).median()
            checks.at_most("median of the same by gradient descent", final, 1e-10)
    return Outcome(checks)


def exact_recovery(
    settings: TheorySettings,
    statement: str = "6",
    grid: tuple[tuple[int, int, int], ...] = ((3, 1, 10), (3, 2, 8), (3, 2, 6), (5, 1, 10)),
) -> Outcome:
    """Statement 6 (theorem 3.3, corollary 3): with T >= 3 and 3k <= d, L = 0 means A = A*."""
    generator = settings.generator(statement)
    checks = Checks()
    for tasks, rank, dim in grid:
        shape = (settings.draws(80),)
        problem = sample_problem(tasks, dim, rank, batch_shape=shape, generator=generator)
        weight, factors, zero = zero_losses(problem, settings, generator)
        base_error = _relative(weight, problem.base)[zero]
        true = problem.factors[:, :-1]
        adapters = _relative(factors @ factors.mT, true @ true.mT)[zero]
        left = relative_loss_left((problem.test_truth - weight)[zero], rank)
        dimension, ratio = solution_dimension(problem.truths, true)
        checks.at = f"T={tasks} k={rank} d={dim}"
        checks.at_most("largest relative error of A where L = 0", base_error.max(), 1e-6)
        checks.at_most("largest relative error of U_t U_tᵀ", adapters.max(), 1e-6)
        what = "largest relative loss that rank k leaves on the test task"
        checks.at_most(what, left.max(), 1e-12)
        checks.at_least("points with L = 0 met from random starts", zero.sum(), 8)
        checks.all_of("global minima are isolated up to rotations", dimension == 0)
        checks.at_least("least ratio of singular values that shows it", ratio.min(), 1e3)
    return Outcome(checks)


def wrong_recovery(settings: TheorySettings) -> Outcome:
    """Control: exact recovery with T = 2. Appendix F.1 says why not."""
    return exact_recovery(settings, "wrong-6", ((2, 1, 10),))


def hyperbola(settings: TheorySettings) -> Outcome:
    """Statement 10 (appendix F.1): with T = 2 the global minima are a continuum, a hyperbola."""
    generator = settings.generator("10")
    true = torch.eye(3, dtype=torch.float64)[:2].unsqueeze(-1)  # e_1, e_2 in R³, [2, 3, 1]
    truths = true @ true.mT
    boosts = torch.linspace(-2, 2, 401, dtype=torch.float64)[:, None, None]
    along = two_task_minima(true.expand(401, 2, 3, 1), boosts)
    on_curve = reduced_loss(truths.expand(401, 2, 3, 3), along)
    shift = best_weight(truths.expand(401, 2, 3, 3), along).norm(dim=(-2, -1))
    starts = settings.draws(200)
    problem = truths.expand(starts, 2, 3, 3).contiguous()
    begin = torch.randn(starts, 2, 3, 1, generator=generator, dtype=torch.float64)
    tuned = lora_ml(
        population_statistics(problem),
        1,
        outer_steps=20000,
        inner_steps=1,
        outer_lr=settings.outer_lr,
        inner_lr=inner_rate(settings, 1.0),
        initial_weight=torch.randn(starts, 3, 3, generator=generator, dtype=torch.float64),
        initial_factors=begin,
    )
    assert tuned.factors is not None
    ends = tuned.factors.squeeze(-1)  # [starts, 2, 3]
    left = loss(problem, tuned.weight, tuned.factors)
    x, y = ends[:, 0, 0], ends[:, 0, 1]
    off = torch.stack([x**2 - y**2 - 1, ends[:, 0, 2]], -1).abs().amax(-1)
    swapped = torch.stack([y, x, 0 * x], -1)  # U_2 = ± the mirror image of U_1
    other = (swapped - ends[:, 1]).norm(dim=-1).minimum((swapped + ends[:, 1]).norm(dim=-1))
    dimension, ratio = solution_dimension(truths, true)
    three = torch.eye(3, dtype=torch.float64).unsqueeze(-1)
    pinned, pinned_ratio = solution_dimension(three @ three.mT, three)
    checks = Checks()
    checks.at_most("largest distance from x² − y² = 1 of U_1 where descent ends", off.max(), 1e-9)
    checks.at_most("largest loss along the hyperbola, b from −2 to 2", on_curve.max(), 1e-25)
    checks.at_least("‖A − A*‖ at its end", shift[-1], 10.0)
    checks.all_of("descent reaches L <= 1e-20", left <= _ZERO, 8)
    checks.at_most("largest distance of U_2 from ±(y, x)", other.max(), 1e-9)
    checks.at_least(
        "least ‖A − A*‖ where descent ends", tuned.weight.norm(dim=(-2, -1)).min(), 1e-6
    )
    checks.at_least("standard deviation of y where descent ends", y.std(), 0.1)
    checks.all_of("dimension of the set of global minima is 1", dimension == 1)
    checks.at_least("ratio of singular values that shows it", ratio, 1e3)
    checks.all_of("with a third task e_3 it is 0", pinned == 0)
    checks.at_least("ratio of singular values that shows it", pinned_ratio, 1e3)
    return Outcome(checks, {"starts": begin[:, 0, :2, 0].tolist(), "ends": ends[:, 0, :2].tolist()})


def descent(settings: TheorySettings) -> Outcome:
    """Statement 12 (section 3.2.2): gradient descent from random starts reaches L = 0.

    One step on all U_t, then one on A, and so on.
    """
    generator = settings.generator("12")
    checks, curves = Checks(), []
    for tasks, rank, dim, steps in (
        (2, 1, 10, 3000),
        (3, 1, 10, 20000),
        (5, 1, 10, 3000),
        (5, 2, 12, 10000),
    ):
        at = f"T={tasks} k={rank} d={dim}"
        shape = (settings.draws(200),)
        problem = sample_problem(tasks, dim, rank, batch_shape=shape, generator=generator)
        weight, factors, losses = _descend(problem, steps, settings, generator)
        size = problem.truths.square().sum((-3, -2, -1))
        reached = loss(problem.truths, weight, factors) / size
        what = f"runs with relative loss <= 1e-12 after {steps} steps, {at}"
        checks.share_at_least(what, reached <= 1e-12, 0.65 if settings.smoke else 0.95)
        shown = torch.unique(torch.logspace(0, torch.log10(torch.tensor(steps)), 120).long()) - 1
        relative = losses * tasks / size.unsqueeze(-1)
        bands = relative[:, shown].quantile(torch.tensor([0.0, 0.5, 1.0]).double(), dim=0)
        curves.append({"at": at, "step": (shown + 1).tolist(), "quantiles": bands.tolist()})
    return Outcome(checks, {"curves": curves})


def zero_losses(
    problem: LinearProblem, settings: TheorySettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs gradient descent from random starts and polishes its end by Newton-like steps.

    Returns:
        A, the U_t, and which of the problems ended with zero loss [...].
    """
    _, factors, _ = _descend(problem, 3000, settings, generator)
    size = problem.truths.square().sum((-3, -2, -1))
    tolerance = 1e-12 * float(size.min()) ** 0.75
    factors = find_critical_points(
        problem.truths, factors, max_steps=30, tolerance=tolerance
    ).factors
    zero = reduced_loss(problem.truths, factors) <= _ZERO * size
    return best_weight(problem.truths, factors), factors, zero


def inner_rate(settings: TheorySettings, size: float) -> float:
    """Returns the step size of the U_t for truths with ‖U_t‖² of about ``size`` instead of d."""
    return 5 * settings.inner_lr / size


def _descend(
    problem: LinearProblem, steps: int, settings: TheorySettings, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    result = lora_ml(
        population_statistics(problem.truths),
        problem.factors.shape[-1],
        outer_steps=steps,
        inner_steps=1,
        outer_lr=settings.outer_lr,
        inner_lr=settings.inner_lr,
        generator=generator,
    )
    assert result.factors is not None
    return result.weight, result.factors, result.losses


def _relative(found: Tensor, true: Tensor) -> Tensor:
    error = (found - true).flatten(1).norm(dim=-1)
    return error / true.flatten(1).norm(dim=-1)
