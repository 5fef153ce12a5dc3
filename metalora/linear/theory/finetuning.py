"""What fine-tuning on n noisy samples reaches at best (paper, lemma 1, corollaries 2 and 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from metalora._checks import (
    check_count,
    check_finite,
    check_matrix_rank,
    check_nonnegative,
    check_values,
)
from metalora.linear.statistics import SufficientStatistics


def best_adapted_weight(stats: SufficientStatistics, weight: Tensor, rank: int) -> Tensor:
    """A + U Vᵀ with the rank-r adapter that minimises the loss of the samples (lemma 1).

    With C G⁻¹ − A the unrestricted solution, the best of rank r is its best approximation in the
    norm of G: the truncated singular value decomposition of (C G⁻¹ − A) G^½, times G^-½.

    Args:
        stats: of the test task's n samples, gram [..., d, d] of full rank.
        weight: A, [..., d, d].
        rank: r, from 1 to d.

    Returns:
        [..., d, d].

    Raises:
        ValueError, TypeError: wrong shapes or dtypes, not finite, or too few samples.
    """
    name = "best_adapted_weight"
    if not isinstance(stats, SufficientStatistics):
        raise TypeError(
            f"{name}: stats must be SufficientStatistics, got {type(stats).__name__}; "
            "make them with sufficient_statistics(x, y)"
        )
    check_matrix_rank(name, rank, stats.dim)
    check_values(name, "weight", weight, "stats.gram", stats.gram, stats.gram.shape)
    check_finite(name, "gram", stats.gram)
    check_finite(name, "cross", stats.cross)
    lower, failed = torch.linalg.cholesky_ex(stats.gram)  # G = L Lᵀ; any root of G will do
    if bool(failed.any()):
        raise ValueError(
            f"{name}: stats must come from at least d = {stats.dim} independent samples, "
            f"got a singular gram ({stats.count} samples)"
        )
    gap = torch.linalg.solve_triangular(
        lower.mT, stats.cross - weight @ stats.gram, upper=True, left=False
    )
    left, values, right = torch.linalg.svd(gap)
    cut = (left[..., :rank] * values[..., None, :rank]) @ right[..., :rank, :]
    return weight + torch.linalg.solve_triangular(lower, cut, upper=False, left=False)


def expected_finetune_error(dim: int, rank: int, noise: float) -> float:
    """σ² r (2d − r): expected ‖X (W − M)ᵀ‖_F² of `best_adapted_weight` on its own inputs X.

    σ² times the number of free entries of a [d, d] matrix of rank r; lemma 1's bound σ² r d is
    this up to a factor between 1 and 2. Holds to first order in the noise where M − A has rank r;
    on fresh inputs the error per sample is 1/n of it.

    Args:
        dim: d, features.
        rank: r, from 1 to d.
        noise: σ.

    Raises:
        ValueError, TypeError: a number is out of range.
    """
    name = "expected_finetune_error"
    check_count(name, "dim", dim)
    check_matrix_rank(name, rank, dim, name="dim")
    check_nonnegative(name, "noise", noise)
    return noise**2 * rank * (2 * dim - rank)
