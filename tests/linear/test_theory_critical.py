"""Critical points and their certificates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metalora.linear import sample_problem, theory
from metalora.linear.theory.critical import _across_rotations


def random_starts(tasks: int, dim: int, rank: int, draws: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    problem = sample_problem(tasks, dim, rank, batch_shape=(draws,), generator=generator)
    shape = (draws, tasks, dim, rank)
    return problem.truths, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("dim", "rank"), [(3, 1), (4, 2)])
def test_two_tasks_have_only_saddles_and_global_minima(dim: int, rank: int) -> None:
    truths, starts = random_starts(2, dim, rank, 100)
    found = theory.find_critical_points(truths, starts)
    size = truths.square().sum((-3, -2, -1))
    chosen = (found.gradient_norms < 1e-10) & (found.losses > 1e-6 * size)
    assert int(chosen.sum()) > 30
    truths, factors = truths[chosen], found.factors[chosen]
    down = theory.lowest_curvature(truths, factors)
    assert float(down.value.max()) < -1e-3
    # The direction is one of eq. 14, with the curvature claimed, and the loss falls along it.
    weight = theory.best_weight(truths, factors)
    flat = torch.cat([down.weight.flatten(1), down.factors.flatten(1)], 1).unsqueeze(-1)
    curvature = (flat.mT @ theory.hessian(truths, weight, factors) @ flat).flatten()
    torch.testing.assert_close(curvature, down.value)
    step = 1e-3
    after = theory.loss(truths, weight + step * down.weight, factors + step * down.factors)
    fall = theory.loss(truths, weight, factors) - after
    torch.testing.assert_close(fall, -down.value * step**2 / 2, rtol=0.05, atol=1e-9)


def test_convergence_shows_in_the_gradient_norm() -> None:
    truths, starts = random_starts(2, 3, 1, 20)
    unmoved = theory.find_critical_points(truths, starts, max_steps=0)
    assert torch.equal(unmoved.factors, starts)
    norms = theory.reduced_gradient(truths, starts).flatten(1).norm(dim=-1)
    torch.testing.assert_close(unmoved.gradient_norms, norms)
    few = theory.find_critical_points(truths, starts, max_steps=5)
    assert bool((few.gradient_norms < norms).all())


def test_one_of_many_is_the_same_as_alone() -> None:
    truths, starts = random_starts(2, 3, 1, 8)
    together = theory.find_critical_points(truths, starts)
    alone = theory.find_critical_points(truths[3], starts[3])
    torch.testing.assert_close(together.factors[3], alone.factors, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 2])
def test_an_isolated_global_minimum_is_certified(rank: int) -> None:
    """The truth itself, with T = 3: positive curvature across the rotations, zero along them."""
    generator = torch.Generator().manual_seed(2)
    problem = sample_problem(3, 3 * rank, rank, generator=generator)
    true = problem.factors[:-1]
    certificate = theory.local_minimum(problem.truths, true)
    assert certificate.loss < 1e-25 and certificate.gradient_norm < 1e-12
    assert certificate.curvature > 0 and certificate.rise > 0
    basis = _across_rotations(true)
    assert basis.shape == (9 * rank**2, 9 * rank**2 - 3 * (rank - 1))
    values = torch.linalg.eigvalsh(theory.reduced_hessian(problem.truths, true))
    assert int((values < 1e-9).sum()) == 3 * (rank - 1)
    # The bound holds at random points of the sphere.
    around = torch.randn(500, basis.shape[1], generator=generator, dtype=torch.float64)
    moves = certificate.radius * around / around.norm(dim=-1, keepdim=True) @ basis.mT
    points = true + moves.reshape(500, *true.shape)
    rises = theory.reduced_loss(problem.truths.expand(500, *problem.truths.shape), points)
    assert float(rises.min()) >= certificate.rise


def test_saddles_and_slopes_are_not_certified() -> None:
    truths, starts = random_starts(2, 3, 1, 1)
    zero = torch.zeros(2, 3, 1, dtype=torch.float64)  # critical, and no minimum
    assert theory.local_minimum(truths[0], zero).rise <= 0
    assert theory.local_minimum(truths[0], starts[0]).rise <= 0


def test_the_net_covers_the_sphere_as_it_says() -> None:
    true = sample_problem(3, 3, 1, generator=torch.Generator().manual_seed(2))
    _, epsilon = theory.rise_on_net(true.truths, true.factors[:-1], 0.1)
    entries = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 1.0])] * 9)
    net = entries[entries.any(-1)]
    net = net / net.norm(dim=-1, keepdim=True)
    random = torch.randn(300, 9, generator=torch.Generator().manual_seed(0))
    worst = torch.tensor([j**0.5 - (j - 1) ** 0.5 for j in range(1, 10)])
    points = torch.cat([random, worst.unsqueeze(0)])
    points = points / points.norm(dim=-1, keepdim=True)
    nearest = torch.cdist(points, net).amin(-1)
    assert float(nearest.max()) <= epsilon + 1e-5
    assert float(nearest[-1]) == pytest.approx(epsilon, abs=1e-5)


def test_a_net_finds_where_the_loss_falls() -> None:
    truths, _ = random_starts(2, 3, 1, 1)
    zero = torch.zeros(2, 3, 1, dtype=torch.float64)
    assert theory.rise_on_net(truths[0], zero, 0.5)[0] < 0
