"""Losses, derivatives and closed forms of the linear model's theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metalora.linear import (
    lora_ml,
    prediction_error,
    sample_problem,
    sample_statistics,
    standard,
    theory,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(tasks: int, dim: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Truths (not symmetric), A and U_t without any structure."""
    g = generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    return normal(tasks, dim, dim), normal(dim, dim), normal(tasks, dim, rank)


@pytest.mark.parametrize(("tasks", "dim", "rank"), [(1, 1, 1), (2, 3, 1), (3, 4, 2), (2, 3, 3)])
def test_derivatives_of_equation_14_are_autograd_s(tasks: int, dim: int, rank: int) -> None:
    truths, weight, factors = point(tasks, dim, rank)
    flat = torch.cat([weight.flatten(), factors.flatten()])

    def full(p: Tensor) -> Tensor:
        a, u = p[: dim * dim].view(dim, dim), p[dim * dim :].view(tasks, dim, rank)
        return sum((m - a - v @ v.T).square().sum() / 2 for m, v in zip(truths, u, strict=True))  # type: ignore[return-value]

    def reduced(p: Tensor) -> Tensor:
        u = p.view(tasks, dim, rank)
        gaps = truths - u @ u.mT
        return (gaps - gaps.mean(0)).square().sum() / 2

    torch.testing.assert_close(theory.loss(truths, weight, factors), full(flat))
    slope = torch.cat([part.flatten() for part in theory.gradient(truths, weight, factors)])
    torch.testing.assert_close(slope, torch.autograd.functional.jacobian(full, flat))
    torch.testing.assert_close(
        theory.hessian(truths, weight, factors), torch.autograd.functional.hessian(full, flat)
    )
    u = factors.flatten()
    torch.testing.assert_close(theory.reduced_loss(truths, factors), reduced(u))
    torch.testing.assert_close(
        theory.reduced_gradient(truths, factors).flatten(),
        torch.autograd.functional.jacobian(reduced, u),
    )
    torch.testing.assert_close(
        theory.reduced_hessian(truths, factors), torch.autograd.functional.hessian(reduced, u)
    )


def test_the_reduced_loss_is_the_least_over_the_weight() -> None:
    truths, weight, factors = point(3, 4, 2)
    best = theory.best_weight(truths, factors)
    least = theory.reduced_loss(truths, factors)
    torch.testing.assert_close(theory.loss(truths, best, factors), least)
    assert theory.loss(truths, weight, factors) > least
    assert float(theory.gradient(truths, best, factors)[0].abs().max()) < 1e-13
    # Its Hessian is the Schur complement of eq. 14's.
    full = theory.hessian(truths, best, factors)
    schur = full[16:, 16:] - full[16:, :16] @ torch.linalg.solve(full[:16, :16], full[:16, 16:])
    torch.testing.assert_close(theory.reduced_hessian(truths, factors), schur)


def test_leading_dimensions_are_separate_problems() -> None:
    problem = sample_problem(3, 4, 2, batch_shape=(2, 5), generator=generator())
    factors = torch.randn(2, 5, 3, 4, 2, generator=generator(1), dtype=torch.float64)
    weight = theory.best_weight(problem.truths, factors)
    for function in (theory.reduced_loss, theory.reduced_gradient, theory.reduced_hessian):
        torch.testing.assert_close(
            function(problem.truths, factors)[1, 2],
            function(problem.truths[1, 2], factors[1, 2]),
        )
    torch.testing.assert_close(
        theory.hessian(problem.truths, weight, factors)[0, 3],
        theory.hessian(problem.truths[0, 3], weight[0, 3], factors[0, 3]),
    )


def test_trainers_descend_the_population_loss() -> None:
    problem = sample_problem(3, 5, 1, generator=generator())
    stats = theory.population_statistics(problem.truths)
    start = torch.randn(3, 5, 1, generator=generator(1), dtype=torch.float64)
    zero = torch.zeros(5, 5, dtype=torch.float64)
    result = lora_ml(*(stats, 1), outer_steps=1, inner_steps=0, outer_lr=0.1, initial_factors=start)
    torch.testing.assert_close(result.losses[0], theory.loss(problem.truths, zero, start) / 3)
    slope, _ = theory.gradient(problem.truths, zero, start)
    torch.testing.assert_close(result.weight, -0.1 / 3 * slope)


def test_standard_minimum_is_where_standard_retraining_ends() -> None:
    problem = sample_problem(4, 5, 2, batch_shape=(3,), generator=generator())
    ended = standard(theory.population_statistics(problem.truths)).weight
    torch.testing.assert_close(ended, theory.standard_minimum(problem.truths))


@pytest.mark.parametrize("correlation", [1.0, 0.4, 0.0])
def test_expected_standard_loss_is_the_mean(correlation: float) -> None:
    draws, tasks, dim, rank = 20000, 3, 4, 2
    g = generator()
    u = torch.randn(draws, tasks, dim, rank, generator=g, dtype=torch.float64)
    v = torch.randn(draws, tasks, dim, rank, generator=g, dtype=torch.float64)
    v = correlation * u + math.sqrt(1 - correlation**2) * v
    truths = u @ v.mT
    gaps = truths - theory.standard_minimum(truths).unsqueeze(-3)
    losses = gaps.square().sum((-2, -1)).mean(-1) / 2
    error = float(losses.std()) / math.sqrt(draws)
    predicted = theory.expected_standard_loss(tasks, dim, rank, correlation)
    assert abs(float(losses.mean()) - predicted) < 4 * error < 0.03 * predicted
    assert theory.expected_standard_loss(1, dim, rank) == 0


@pytest.mark.parametrize(("tasks", "dim", "rank"), [(2, 8, 1), (3, 8, 2), (5, 4, 2)])
def test_standard_gap_has_its_rank(tasks: int, dim: int, rank: int) -> None:
    problem = sample_problem(tasks, dim, rank, batch_shape=(50,), generator=generator())
    gap = problem.test_truth - theory.standard_minimum(problem.truths)
    found, ratio = theory.numerical_rank(gap)
    wanted = theory.standard_gap_rank(tasks, dim, rank)
    assert bool((found == wanted).all()) and float(ratio.min()) > 1e3
    assert float(theory.best_finetune_loss(gap, wanted).max()) < 1e-24
    assert float(theory.best_finetune_loss(gap, wanted - 1).min()) > 1e-16


def test_many_task_bound_holds_and_is_attained() -> None:
    dim, rank = 7, 2
    problem = sample_problem(1, dim, rank, batch_shape=(200,), generator=generator())
    gap = problem.factors[:, 0] @ problem.factors[:, 0].mT - rank * torch.eye(dim)
    for r in range(dim + 1):
        bound = theory.many_task_loss_bound(dim, rank, r)
        assert float(theory.best_finetune_loss(gap, r).min()) >= bound - 1e-12
    aligned = torch.zeros(dim, dim, dtype=torch.float64)
    aligned[:2, :2] = rank * torch.eye(2)  # an adapter that cancels its share of k I
    attained = theory.best_finetune_loss(aligned - rank * torch.eye(dim), 1)
    assert float(attained) == theory.many_task_loss_bound(dim, rank, 1) == 0.5 * 4 * 4


def test_numerical_rank_reads_the_gap() -> None:
    values = torch.tensor([3.0, 1e-3, 1e-9, 0.0], dtype=torch.float64)
    rank, ratio = theory.numerical_rank(torch.diag(values))
    assert int(rank) == 3 and 1e5 < float(ratio) < 1e7
    rank, ratio = theory.numerical_rank(torch.diag(values), tolerance=1e-6)
    assert int(rank) == 2 and float(ratio) == pytest.approx(1e6)
    assert int(theory.numerical_rank(torch.eye(4).double())[0]) == 4


def test_best_adapted_weight_minimises_the_samples_loss() -> None:
    problem = sample_problem(2, 5, 1, batch_shape=(3,), generator=generator())
    stats = sample_statistics(problem.test_truth, 40, noise=0.5, generator=generator(1))
    start = theory.standard_minimum(problem.truths)

    def excess(weight: Tensor) -> Tensor:
        """‖y − W x‖² summed over the samples, up to a constant."""
        return (weight * (weight @ stats.gram - 2 * stats.cross)).sum((-2, -1))

    for rank in (1, 3, 5):
        best = theory.best_adapted_weight(stats, start, rank)
        found, _ = theory.numerical_rank(best - start)
        assert bool((found == rank).all())
        u, values, v = torch.linalg.svd(best - start)
        left = (u * values.unsqueeze(-2))[..., :rank]
        for seed in range(20):  # nearby adapters of the same rank are no better
            g = generator(seed)
            du = 1e-2 * torch.randn(left.shape, generator=g, dtype=torch.float64)
            dv = 1e-2 * torch.randn(v[..., :rank, :].shape, generator=g, dtype=torch.float64)
            near = start + (left + du) @ (v[..., :rank, :] + dv)
            assert bool((excess(near) > excess(best)).all())
    torch.testing.assert_close(
        theory.best_adapted_weight(stats, start, 5),
        torch.linalg.solve(stats.gram, stats.cross, left=False),
    )


def test_expected_finetune_error_is_the_mean() -> None:
    problem = sample_problem(2, 8, 1, batch_shape=(600,), generator=generator())
    start = theory.standard_minimum(problem.truths)
    stats = sample_statistics(problem.test_truth, 200, noise=0.01, generator=generator(1))
    best = theory.best_adapted_weight(stats, start, 3)
    errors = prediction_error(stats, best, problem.test_truth)
    predicted = theory.expected_finetune_error(8, 3, 0.01)
    assert predicted == pytest.approx(1e-4 * 3 * 13)
    error = float(errors.std()) / math.sqrt(600)
    assert abs(float(errors.mean()) - predicted) < 4 * error < 0.06 * predicted


def test_two_task_minima_are_the_hyperbola_of_f_1() -> None:
    factors = torch.eye(2, dtype=torch.float64).unsqueeze(-1)
    truths = factors @ factors.mT
    for b in (-1.5, 0.0, 0.7):
        u = theory.two_task_minima(factors, torch.tensor([[b]], dtype=torch.float64))
        expected = [[math.cosh(b), math.sinh(b)], [math.sinh(b), math.cosh(b)]]
        torch.testing.assert_close(u.squeeze(-1), torch.tensor(expected, dtype=torch.float64))
        assert float(theory.reduced_loss(truths, u)) < 1e-26
    assert int(theory.solution_dimension(truths, factors)[0]) == 1


@pytest.mark.parametrize(("tasks", "rank", "wanted"), [(2, 1, 1), (2, 2, 4), (3, 1, 0), (3, 2, 0)])
def test_global_minima_are_isolated_from_three_tasks_on(tasks: int, rank: int, wanted: int) -> None:
    problem = sample_problem(tasks, 3 * rank, rank, batch_shape=(10,), generator=generator())
    found, ratio = theory.solution_dimension(problem.truths, problem.factors[:, :-1])
    assert bool((found == wanted).all()) and float(ratio.min()) > 1e3


def test_two_task_minima_leave_a_gap_of_rank_2k() -> None:
    problem = sample_problem(2, 8, 2, batch_shape=(10,), generator=generator())
    boost = torch.randn(10, 2, 2, generator=generator(1), dtype=torch.float64)
    u = theory.two_task_minima(problem.factors[:, :-1], boost)
    size = problem.truths.square().sum((-3, -2, -1))
    assert float((theory.reduced_loss(problem.truths, u) / size).max()) < 1e-22
    gap = theory.best_weight(problem.truths, u) - problem.base
    rank, _ = theory.numerical_rank(gap, 1e-9)
    assert bool((rank == theory.base_gap_rank(2, 8, 2)).all())
    assert theory.base_gap_rank(3, 8, 2) == 0
