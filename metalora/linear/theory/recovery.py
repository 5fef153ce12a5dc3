"""What LoRA-ML's zero loss says of A* and the adapters (paper, theorems 3.2 and 3.3, appendix F.1).

L = 0 holds exactly where A − A* = R_t − U_t U_tᵀ is the same matrix for all tasks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalora._checks import check_constant, check_count, check_finite, check_values
from metalora.linear.theory.objective import reduced_hessian
from metalora.linear.theory.standard import numerical_rank


def base_gap_rank(num_tasks: int, dim: int, rank: int) -> int:
    """Largest rank of A − A* where L = 0 on generic truths with 3k <= d.

    2k with one task or two (theorem 3.2: R_t − U_t U_tᵀ can have no more), 0 with three or more
    (theorem 3.3): a test task then needs a fine-tuning rank of k more (corollaries 1 and 3).

    Raises:
        ValueError, TypeError: a number is out of range, or 3k > d.
    """
    name = "base_gap_rank"
    for argument, value in (("num_tasks", num_tasks), ("dim", dim), ("rank", rank)):
        check_count(name, argument, value)
    if 3 * rank > dim:
        raise ValueError(f"{name}: dim must be at least 3 rank = {3 * rank}, got {dim}")
    return 2 * rank if num_tasks < 3 else 0


def two_task_minima(factors: Tensor, boost: Tensor) -> Tensor:
    """Global minima of eq. 14 with two tasks: [U_1* U_2*] exp([[0, B], [Bᵀ, 0]]) (appendix F.1).

    R_1 − R_2 does not change under O(k, k), of which these are the boosts. For k = 1, U_1* = e_1
    and U_2* = e_2 they are U_1 = (cosh b, sinh b) and U_2 = (sinh b, cosh b): U_1 runs along the
    hyperbola x² − y² = 1.

    Args:
        factors: U_1* and U_2*, [..., 2, d, k].
        boost: B, [..., k, k].

    Returns:
        U_1 and U_2, [..., 2, d, k].

    Raises:
        ValueError, TypeError: wrong shapes or dtypes, or not finite.
    """
    name = "two_task_minima"
    check_constant(name, "factors", factors)
    if factors.dim() < 3 or factors.shape[-3] != 2:
        raise ValueError(f"{name}: factors must be [..., T=2, d, k], got {list(factors.shape)}")
    rank = factors.shape[-1]
    check_finite(name, "factors", factors)
    check_values(name, "boost", boost, "factors", factors, (*factors.shape[:-3], rank, rank))
    zero = torch.zeros_like(boost)
    generator = torch.cat([torch.cat([zero, boost], -1), torch.cat([boost.mT, zero], -1)], -2)
    both = factors.movedim(-3, -2).flatten(-2)  # [..., d, 2k]
    moved = both @ torch.linalg.matrix_exp(generator)
    return moved.unflatten(-1, (2, rank)).movedim(-2, -3)


def solution_dimension(truths: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Dimension of the set of global minima around one, the tasks' rotations not counted.

    The flat directions of the Hessian, but for the T k(k−1)/2 of the rotations. On generic truths
    k² with two tasks (appendix F.1: O(k, k) without its rotations), 0 with three or more and
    3k <= d (theorem 3.3).

    Args:
        truths: M_t, [..., T, d, d].
        factors: U_t of a global minimum, [..., T, d, k], each of rank k.

    Returns:
        (dimension int64 [...], the singular values' gap that shows it [...]; see `numerical_rank`).

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or values.
    """
    tasks, dim, rank = factors.shape[-3:]
    found, ratio = numerical_rank(reduced_hessian(truths, factors))
    return tasks * (dim * rank - rank * (rank - 1) // 2) - found, ratio
