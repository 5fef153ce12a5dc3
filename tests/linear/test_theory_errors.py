"""Bad input of the theory's functions: one clear line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from metalora.linear import SufficientStatistics, sample_data, sample_problem, theory

M = torch.eye(4, dtype=torch.float64).repeat(3, 1, 1)
U = torch.ones(3, 4, 1, dtype=torch.float64)
A = M[0]
NAN = float("nan")
STATS = SufficientStatistics(A, A, A[0, 0], 9)

CASES: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: sample_problem(0, 4, 1), ValueError, "num_tasks must be an int >= 1, got 0"),
    (lambda: sample_problem(2, 4, 5), ValueError, "rank must be at most dim = 4, got 5"),
    (lambda: sample_data(A, 0), ValueError, "count must be an int >= 1, got 0"),
    (lambda: sample_data(A, 3, noise=-0.1), ValueError, "noise must be a finite number >= 0"),
    (lambda: theory.loss(M[0], A, U), ValueError, "loss: truths must be [..., T, d, d]"),
    (lambda: theory.loss(M[:0], A, U[:0]), ValueError, "with T, d >= 1, got [0, 4, 4]"),
    (lambda: theory.loss(M * NAN, A, U), ValueError, "loss: truths must be finite"),
    (lambda: theory.loss(M, A * NAN, U), ValueError, "loss: weight must be finite"),
    (lambda: theory.loss(M, A[:3], U), ValueError, "weight must be [4, 4], got [3, 4]"),
    (lambda: theory.gradient(M, A, U[:2]), ValueError, "factors must be [..., T=3, d=4, k]"),
    (
        lambda: theory.hessian(M, A, U.float()),
        TypeError,
        "factors must have the dtype of truths, torch.float64",
    ),
    (lambda: theory.best_weight(M, M[0]), ValueError, "factors must be [..., T=3, d=4, k]"),
    (
        lambda: theory.reduced_loss(M, torch.ones(3, 4, 5, dtype=torch.float64)),
        *(ValueError, "reduced_loss: factors must have k at most d = 4, got 5"),
    ),
    (lambda: theory.reduced_gradient(M, U * NAN), ValueError, "factors must be finite"),
    (lambda: theory.reduced_hessian(M.numpy(), U), TypeError, "truths must be a tensor"),
    (lambda: theory.population_statistics(M[0, 0]), ValueError, "truths must be [..., d, d]"),
    (lambda: theory.population_statistics(M / 0), ValueError, "truths must be finite"),
    (lambda: theory.standard_minimum(M[:0]), ValueError, "with T >= 1, got [0, 4, 4]"),
    (lambda: theory.standard_minimum(M * NAN), ValueError, "truths must be finite"),
    (lambda: theory.expected_standard_loss(0, 4, 1), ValueError, "num_tasks must be an int >= 1"),
    (lambda: theory.expected_standard_loss(2, 4, 5), ValueError, "rank must be at most dim = 4"),
    (
        lambda: theory.expected_standard_loss(2, 4, 1, 1.5),
        *(ValueError, "correlation must be from -1 to 1, got 1.5"),
    ),
    (lambda: theory.standard_gap_rank(2, 0, 1), ValueError, "dim must be an int >= 1, got 0"),
    (lambda: theory.many_task_loss_bound(4, 1, 5), ValueError, "finetune_rank must be at most d"),
    (lambda: theory.best_finetune_loss(A, 5), ValueError, "finetune_rank must be at most d = 4"),
    (lambda: theory.best_finetune_loss(A[:3], 1), ValueError, "gap must be [..., d, d]"),
    (lambda: theory.numerical_rank(0 * A), ValueError, "matrix must not be zero"),
    (lambda: theory.numerical_rank(A, -1.0), ValueError, "tolerance must be a finite number > 0"),
    (lambda: theory.base_gap_rank(3, 5, 2), ValueError, "dim must be at least 3 rank = 6, got 5"),
    (lambda: theory.two_task_minima(U, A[:1, :1]), ValueError, "factors must be [..., T=2, d, k]"),
    (lambda: theory.two_task_minima(U[:2], A), ValueError, "boost must be [1, 1], got [4, 4]"),
    (lambda: theory.best_adapted_weight(A, A, 1), TypeError, "stats must be SufficientStatistics"),  # type: ignore[arg-type]
    (lambda: theory.best_adapted_weight(STATS, A, 5), ValueError, "rank must be at most d = 4"),
    (lambda: theory.best_adapted_weight(STATS, A[:3], 1), ValueError, "weight must be [4, 4]"),
    (
        lambda: theory.best_adapted_weight(SufficientStatistics(0 * A, A, A[0, 0], 2), A, 1),
        *(ValueError, "stats must come from at least d = 4 independent samples"),
    ),
    (lambda: theory.expected_finetune_error(4, 1, -1.0), ValueError, "noise must be a finite"),
    (lambda: theory.expected_finetune_error(4, 5, 0.1), ValueError, "rank must be at most dim = 4"),
    (lambda: theory.find_critical_points(M, U, tolerance=0.0), ValueError, "tolerance must be"),
    (
        lambda: theory.find_critical_points(M.expand(2, 3, 4, 4), U),
        *(ValueError, "starts must have the leading dimensions [2] of truths, got []"),
    ),
    (lambda: theory.rise_on_net(M, U, 0.0), ValueError, "radius must be a finite number > 0"),
    (
        lambda: theory.rise_on_net(M, torch.randn(3, 4, 2, dtype=torch.float64), 0.1),
        *(ValueError, "rise_on_net: factors must have at most 12 directions"),
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), CASES)
def test_one_line(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
