from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from metalora.linear import (
    SufficientStatistics,
    finetune_lora,
    lora_ml,
    sample_data,
    sample_problem,
    sample_statistics,
    standard,
    sufficient_statistics,
)
from metalora.meta import DivergedError

pytestmark = pytest.mark.usefixtures("backend")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=seeded(seed), dtype=torch.float64).to(dtype)


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    assert actual.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    assert float(np.abs(actual.numpy() - expected).max()) <= tolerance * scale


# (T, N, d, k): one task, fewer samples than dimensions, full rank, odd and long columns
SHAPES = [(3, 12, 10, 1), (1, 5, 3, 1), (2, 4, 5, 5), (4, 9, 7, 3), (2, 15, 13, 2), (2, 30, 27, 4)]


@pytest.mark.parametrize(("tasks", "count", "dim", "rank"), SHAPES)
def test_iterates_are_those_of_looping_over_samples(
    oracle: SimpleNamespace, tasks: int, count: int, dim: int, rank: int
) -> None:
    problem = sample_problem(tasks, dim, rank, generator=seeded(dim))
    x, y = sample_data(problem.truths, count, generator=seeded(1))
    stats = sufficient_statistics(x, y)
    start, factors = normal(dim, dim, seed=3), normal(tasks, dim, rank)
    lr = 0.003 / rank
    result = lora_ml(
        stats,
        rank,
        outer_steps=12,
        inner_steps=4,
        inner_lr=lr,
        initial_weight=start,
        initial_factors=factors,
    )
    weight, expected_factors, losses = oracle.lora_ml_by_samples(
        x.numpy(), y.numpy(), start.numpy(), factors.numpy(), 12, 4, 0.03, lr
    )
    close(result.weight, weight, 1e-10)
    close(result.factors, expected_factors, 1e-10)
    close(result.losses, losses, 1e-10)

    plain = standard(stats, steps=20, initial_weight=start)
    weight, losses = oracle.standard_by_samples(x.numpy(), y.numpy(), start.numpy(), 20, 0.03)
    close(plain.weight, weight, 1e-10)
    close(plain.losses, losses, 1e-10)
    assert plain.factors is None


@pytest.mark.parametrize(("count", "dim", "rank"), [(12, 10, 1), (4, 5, 5), (9, 7, 3), (30, 27, 4)])
def test_finetuning_is_that_of_looping_over_samples(
    oracle: SimpleNamespace, count: int, dim: int, rank: int
) -> None:
    truth = sample_problem(1, dim, 1, generator=seeded(dim)).test_truth
    x, y = sample_data(truth, count, generator=seeded(1))
    weight, u, v = normal(dim, dim), normal(dim, rank, seed=1), normal(dim, rank, seed=2)
    arguments = [t.numpy() for t in (x, y, weight, u, v, truth)]
    expected = oracle.finetune_by_samples(*arguments, 25, 0.005)
    result = finetune_lora(
        sufficient_statistics(x, y), weight, rank, steps=25, initial_factors=(u, v), truth=truth
    )
    assert result.errors is not None
    for actual, wanted in zip(
        (*result.factors, result.losses, result.errors), expected, strict=True
    ):
        close(actual, wanted, 1e-10)
    # The comparison can tell: moving V after U, rather than with it, is another algorithm.
    sequential = oracle.finetune_by_samples(*arguments, 25, 0.005, sequential=True)
    with pytest.raises(AssertionError):
        close(result.factors[1], sequential[1], 1e-10)


@pytest.mark.slow
def test_a_run_of_the_papers_length(oracle: SimpleNamespace, backend: str) -> None:
    steps = 3000 if backend == "native" else 300
    problem = sample_problem(3, 10, 1, generator=seeded(11))
    stats = sample_statistics(problem.truths, 1000, generator=seeded(12))
    factors = normal(3, 10, 1)
    result = lora_ml(stats, 1, outer_steps=steps, initial_factors=factors)
    weight, expected = oracle.lora_ml(
        *(stats.gram.numpy(), stats.cross.numpy(), 1000, np.zeros((10, 10)), factors.numpy()),
        *(steps, 10, 0.03, 0.003),
    )
    close(result.weight, weight, 1e-9)
    close(result.factors, expected, 1e-9)

    test_stats = sample_statistics(problem.test_truth, 100, generator=seeded(13))
    u, v = normal(10, 1, seed=1), normal(10, 1, seed=2)
    tuned = finetune_lora(test_stats, result.weight, 1, steps=steps, initial_factors=(u, v))
    assert tuned.errors is None
    sums = (test_stats.gram.numpy(), test_stats.cross.numpy(), 100)
    wanted = oracle.finetune(*sums, result.weight.numpy(), u.numpy(), v.numpy(), steps, 0.005)
    close(tuned.factors[0], wanted[0], 1e-9)
    close(tuned.factors[1], wanted[1], 1e-9)


def test_each_step_is_a_gradient_step() -> None:
    problem = sample_problem(2, 4, 2, generator=seeded())
    x, y = sample_data(problem.truths, 20, generator=seeded(1))
    a = normal(4, 4).requires_grad_()
    u = normal(2, 4, 2).requires_grad_()

    def loss(a: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        predicted = x @ (a + u @ u.mT).mT
        return (y - predicted).square().sum((-2, -1)) / (2 * 20)

    stats = sufficient_statistics(x, y)
    start = {"initial_weight": a.detach(), "initial_factors": u.detach()}
    (gradient,) = torch.autograd.grad(loss(a, u).sum(), u)
    stepped = lora_ml(stats, 2, outer_steps=1, inner_steps=1, outer_lr=0.0, **start)
    torch.testing.assert_close(stepped.factors, (u - 0.003 * gradient).detach())

    (gradient,) = torch.autograd.grad(loss(a, u).mean(), a)
    stepped = lora_ml(stats, 2, outer_steps=1, inner_steps=0, **start)
    torch.testing.assert_close(stepped.weight, (a - 0.03 * gradient).detach())
    torch.testing.assert_close(stepped.losses[0], loss(a, u).mean().detach())
    assert torch.equal(stepped.factors, u.detach())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_are_separate_trainings(dtype: torch.dtype) -> None:
    problem = sample_problem(3, 6, 2, batch_shape=(2, 3), generator=seeded(), dtype=dtype)
    stats = sample_statistics(problem.truths, 50, generator=seeded(1))
    test_stats = sample_statistics(problem.test_truth, 20, generator=seeded(2))
    factors = normal(2, 3, 3, 6, 2, dtype=dtype)
    u, v = normal(2, 3, 6, 3, seed=1, dtype=dtype), normal(2, 3, 6, 3, seed=2, dtype=dtype)
    steps = {"outer_steps": 30, "inner_lr": 0.002}
    whole = lora_ml(stats, 2, initial_factors=factors, **steps)
    plain = standard(stats, steps=30)
    tuned = finetune_lora(
        *(test_stats, whole.weight, 3),
        steps=40,
        lr=0.003,
        initial_factors=(u, v),
        truth=problem.test_truth,
    )
    assert whole.weight.dtype == dtype
    assert whole.losses.shape == (2, 3, 30) and plain.losses.shape == (2, 3, 30)
    assert tuned.errors is not None and tuned.errors.shape == (2, 3, 41)
    tolerance = {"rtol": 0.0, "atol": 1e-12} if dtype == torch.float64 else {}
    for i in np.ndindex(2, 3):
        one = SufficientStatistics(stats.gram[i], stats.cross[i], stats.energy[i], 50)
        alone = lora_ml(one, 2, initial_factors=factors[i], **steps)
        torch.testing.assert_close(whole.weight[i], alone.weight, **tolerance)
        torch.testing.assert_close(whole.factors[i], alone.factors, **tolerance)
        torch.testing.assert_close(plain.weight[i], standard(one, steps=30).weight, **tolerance)


def test_float32_follows_float64() -> None:
    problem = sample_problem(3, 10, 1, generator=seeded())
    stats = sample_statistics(problem.truths, 500, generator=seeded(1))
    double = lora_ml(stats, 1, outer_steps=200, generator=seeded(2))
    single = lora_ml(stats.to(dtype=torch.float32), 1, outer_steps=200, generator=seeded(2))
    torch.testing.assert_close(single.weight.double(), double.weight, rtol=0, atol=1e-4)


def test_one_weight_for_many_test_tasks() -> None:
    problem = sample_problem(3, 5, 1, batch_shape=(2,), generator=seeded())
    stats = sample_statistics(problem.truths, 20, generator=seeded(1))  # [2, 3 tasks]
    u, v = normal(2, 3, 5, 1, seed=1), normal(2, 3, 5, 1, seed=2)
    shared = {"steps": 10, "initial_factors": (u, v)}
    result = finetune_lora(stats, problem.base, 1, truth=problem.truths, **shared)
    expanded = finetune_lora(stats, problem.base[:, None].expand(2, 3, 5, 5), 1, **shared)
    assert result.factors[0].shape == (2, 3, 5, 1)
    assert torch.equal(result.factors[0], expanded.factors[0])
    with pytest.raises(ValueError, match=r"weight must be \[2, 3, d=5, d=5\]"):
        finetune_lora(stats, problem.base[:1], 1, **shared)


def test_errors_of_the_curve_are_those_on_the_inputs() -> None:
    truth = sample_problem(1, 6, 1, generator=seeded()).test_truth
    x, y = sample_data(truth, 30, noise=0, generator=seeded(1))
    stats = sufficient_statistics(x, y)
    # Without noise the error falls to rounding; it must neither turn negative nor stall above.
    result = finetune_lora(stats, truth - 2.0, 1, steps=3000, truth=truth, generator=seeded(2))
    assert result.errors is not None
    assert bool((result.errors >= 0).all())
    assert float(result.errors[-1]) < 1e-20
    result = finetune_lora(stats, truth - 2.0, 1, steps=40, truth=truth, generator=seeded(2))
    u, v = result.factors
    gap = x @ (u @ v.mT - 2.0).mT
    assert result.errors is not None
    torch.testing.assert_close(result.errors[-1], gap.square().sum())


def test_starts() -> None:
    problem = sample_problem(3, 30, 20, generator=seeded())
    stats = sample_statistics(problem.truths, 100, generator=seeded(1))
    none = {"outer_steps": 0}
    start = lora_ml(stats, 20, generator=seeded(5), **none)
    assert start.losses.shape == (0,)
    assert not start.weight.any()
    assert start.factors is not None
    assert float(start.factors.std()) == pytest.approx(0.1, rel=0.1)
    again = lora_ml(stats, 20, generator=seeded(5), **none)
    assert torch.equal(start.factors, again.factors)
    other = lora_ml(stats, 20, generator=seeded(6), **none)
    assert not torch.equal(start.factors, other.factors)
    torch.manual_seed(5)
    default = lora_ml(stats, 20, **none)
    assert torch.equal(start.factors, default.factors)


def test_inputs_are_left_alone_and_layout_does_not_matter() -> None:
    problem = sample_problem(2, 5, 1, batch_shape=(3,), generator=seeded())
    stats = sample_statistics(problem.truths, 20, generator=seeded(1))
    factors = normal(3, 2, 5, 1)
    before = [t.clone() for t in (stats.gram, stats.cross, stats.energy, factors)]
    result = lora_ml(stats, 1, outer_steps=5, initial_factors=factors)
    for tensor, copy in zip((stats.gram, stats.cross, stats.energy, factors), before, strict=True):
        assert torch.equal(tensor, copy)
    strided = SufficientStatistics(
        stats.gram.mT.contiguous().mT,
        stats.cross.mT.contiguous().mT,
        stats.energy.T.contiguous().T,
        20,
    )
    other = lora_ml(
        strided,
        1,
        outer_steps=5,
        initial_factors=factors.transpose(0, 1).contiguous().transpose(0, 1),
    )
    torch.testing.assert_close(result.weight, other.weight, rtol=0, atol=1e-14)


def test_no_trainings_at_all() -> None:
    empty = torch.zeros(0, 3, 4, 4, dtype=torch.float64)
    stats = SufficientStatistics(empty, empty, empty[..., 0, 0], 10)
    result = lora_ml(stats, 1, outer_steps=5)
    assert result.weight.shape == (0, 4, 4) and result.losses.shape == (0, 5)
    assert standard(stats, steps=5).weight.shape == (0, 4, 4)


@pytest.mark.parametrize("method", ["lora-ml", "standard", "finetune"])
def test_divergence_names_the_step_and_the_training(method: str) -> None:
    problem = sample_problem(2, 4, 1, batch_shape=(3,), generator=seeded())
    stats = sample_statistics(problem.truths, 20, generator=seeded(1))
    tame = SufficientStatistics(
        *(
            t * torch.tensor([0, 1, 0]).view(3, *[1] * (t.dim() - 1))
            for t in (stats.gram, stats.cross, stats.energy)
        ),
        20,
    )
    one = SufficientStatistics(tame.gram[:, 0], tame.cross[:, 0], tame.energy[:, 0], 20)
    zero = torch.zeros(3, 4, 4, dtype=torch.float64)
    train = {
        "lora-ml": lambda: lora_ml(tame, 1, inner_lr=10.0, outer_steps=50),
        "standard": lambda: standard(tame, lr=100.0, steps=1000),
        "finetune": lambda: finetune_lora(one, zero, 1, steps=400, lr=10.0),
    }
    with pytest.raises(DivergedError) as caught:
        train[method]()
    message = str(caught.value)
    assert "training [1] of [3]: diverged, not finite at step " in message
    assert "lower " in message and "\n" not in message
