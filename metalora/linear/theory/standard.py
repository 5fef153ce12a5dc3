"""What standard retraining reaches on the population losses, and what it leaves to fine-tuning.

Paper, eq. 12, theorem 3.1, propositions 1 and 2, and appendix C. Adapters may be asymmetric,
U_t* V_t*ᵀ: the entries of U_t* and V_t* are N(0, 1), independent but for the correlation ρ of each
entry of U_t* with the same entry of V_t*. Symmetric adapters are ρ = 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metalora._checks import (
    check_constant,
    check_count,
    check_finite,
    check_matrix_rank,
    check_positive,
    check_square,
)


def standard_minimum(truths: Tensor) -> Tensor:
    """Â_SR = mean_t M_t, the one minimiser of Σ_t ½ ‖M_t − A‖_F² (eq. 12).

    Args:
        truths: M_t, [..., T, d, d].

    Returns:
        [..., d, d].

    Raises:
        ValueError, TypeError: wrong shape or dtype, or not finite.
    """
    name = "standard_minimum"
    check_constant(name, "truths", truths)
    if truths.dim() < 3 or truths.shape[-1] != truths.shape[-2] or truths.shape[-3] == 0:
        raise ValueError(
            f"{name}: truths must be [..., T, d, d] with T >= 1, got {list(truths.shape)}"
        )
    return check_finite(name, "truths", truths).mean(-3)


def expected_standard_loss(num_tasks: int, dim: int, rank: int, correlation: float = 1.0) -> float:
    """E[(1/T) Σ_t L*_t(Â_SR)] = ½ (1 − 1/T) k d (d + ρ²) (theorem 3.1; appendix C).

    It is (1 − 1/T) times half the total variance of an adapter's entries. For ρ = 1 the adapter is
    a Wishart matrix, with variance k (1 + δ_ij) in entry i, j.

    Args:
        num_tasks: T.
        dim: d.
        rank: k, at most d.
        correlation: ρ, from −1 to 1.

    Raises:
        ValueError, TypeError: a number is out of range.
    """
    name = "expected_standard_loss"
    check_count(name, "num_tasks", num_tasks)
    _check_model(name, dim, rank, correlation)
    return 0.5 * (1 - 1 / num_tasks) * rank * dim * (dim + correlation**2)


def standard_gap_rank(num_tasks: int, dim: int, rank: int) -> int:
    """Rank of M_{T+1} − Â_SR: min(k (T + 1), d), almost surely (proposition 1).

    Arguments and errors as for `expected_standard_loss`.
    """
    name = "standard_gap_rank"
    check_count(name, "num_tasks", num_tasks)
    _check_model(name, dim, rank, 1.0)
    return min(rank * (num_tasks + 1), dim)


def many_task_loss_bound(
    dim: int, rank: int, finetune_rank: int, correlation: float = 1.0
) -> float:
    """½ (d − k − r)⁺ (ρ k)²: no fine-tuning of rank r does better once T → ∞ (proposition 2).

    Â_SR → A* + ρ k I then, so the gap U Vᵀ − ρ k I of the test task has at most k singular values
    below ``|ρ| k``, and an adapter of rank r removes r others.

    Args:
        dim: d.
        rank: k, at most d.
        finetune_rank: r, from 0 to d.
        correlation: ρ, from −1 to 1.

    Raises:
        ValueError, TypeError: a number is out of range.
    """
    name = "many_task_loss_bound"
    _check_model(name, dim, rank, correlation)
    check_matrix_rank(name, finetune_rank, dim, argument="finetune_rank", minimum=0)
    return 0.5 * max(dim - rank - finetune_rank, 0) * (correlation * rank) ** 2


def best_finetune_loss(gap: Tensor, rank: int) -> Tensor:
    """min over U, V [d, r] of ½ ‖gap − U Vᵀ‖_F²: half of σ_{r+1}² + ... + σ_d².

    Args:
        gap: M_{T+1} − Â, [..., d, d].
        rank: r, from 0 to d.

    Returns:
        [...].

    Raises:
        ValueError, TypeError: wrong shape or dtype, not finite, or a rank out of range.
    """
    name = "best_finetune_loss"
    check_finite(name, "gap", check_square(name, "gap", check_constant(name, "gap", gap)))
    check_matrix_rank(name, rank, gap.shape[-1], argument="finetune_rank", minimum=0)
    return torch.linalg.svdvals(gap)[..., rank:].square().sum(-1) / 2


def numerical_rank(matrix: Tensor, tolerance: float = 1e-12) -> tuple[Tensor, Tensor]:
    """Rank, and how wide the gap between the singular values is that it is read from.

    Args:
        matrix: [..., d, d], not zero.
        tolerance: singular values up to so many times the largest count as zero.

    Returns:
        (rank r, int64 [...]; σ_r / σ_{r+1} [...], with d ε σ_1 for a smaller or absent σ_{r+1}).

    Raises:
        ValueError, TypeError: wrong dtype, a tolerance that is not positive, or a matrix that is
            zero or not finite.
    """
    name = "numerical_rank"
    check_finite(name, "matrix", check_constant(name, "matrix", matrix))
    check_positive(name, "tolerance", tolerance)
    values = torch.linalg.svdvals(matrix)
    if not bool((values[..., 0] > 0).all()):
        raise ValueError(f"{name}: matrix must not be zero")
    rank = (values > tolerance * values[..., :1]).sum(-1)
    floor = values[..., :1] * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    values = torch.cat([values, floor], -1).maximum(floor)
    last = rank.unsqueeze(-1)
    return rank, (values.gather(-1, last - 1) / values.gather(-1, last)).squeeze(-1)


def _check_model(function: str, dim: int, rank: int, correlation: float) -> None:
    check_count(function, "dim", dim)
    check_matrix_rank(function, rank, dim, name="dim")
    if not (math.isfinite(correlation) and -1 <= correlation <= 1):
        raise ValueError(f"{function}: correlation must be from -1 to 1, got {correlation!r}")
