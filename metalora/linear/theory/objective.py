"""The population loss of LoRA-ML with symmetric adapters (paper, eq. 14) and its derivatives.

    L(A, U) = ½ Σ_t ‖E_t‖_F²,    E_t = M_t − A − U_t U_tᵀ.

For given U the best A is the mean of M_t − U_t U_tᵀ. The *reduced* loss f(U) = min_A L(A, U) has
the same critical points, and one of them is a local minimum of f exactly where it is one of L: the
Hessian of f is the Schur complement, in that of L, of the block T·I that belongs to A.

Every function raises ValueError or TypeError where shapes, dtypes or devices do not fit together or
values are not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metalora._checks import check_constant, check_finite, check_square, check_values
from metalora.linear.statistics import SufficientStatistics


def population_statistics(truths: Tensor) -> SufficientStatistics:
    """Statistics with which the trainers descend the population losses ½ ‖M_t − B‖_F² themselves.

    They stand for infinitely many noiseless samples: the mean of x xᵀ is I, that of y xᵀ is M_t.

    Args:
        truths: M_t, [..., d, d].
    """
    name = "population_statistics"
    check_square(name, "truths", check_constant(name, "truths", truths))
    check_finite(name, "truths", truths)
    identity = torch.eye(truths.shape[-1], dtype=truths.dtype, device=truths.device)
    energy = truths.square().sum((-2, -1))
    return SufficientStatistics(identity.expand(truths.shape).contiguous(), truths, energy, 1)


def loss(truths: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    """L(A, U) of eq. 14.

    Args:
        truths: M_t, [..., T, d, d].
        weight: A, [..., d, d].
        factors: U_t, [..., T, d, k].

    Returns:
        [...].
    """
    _check("loss", truths, factors, weight)
    return _residuals(truths, weight, factors).square().sum((-3, -2, -1)) / 2


def gradient(truths: Tensor, weight: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of eq. 14: in A, −Σ_t E_t [..., d, d]; in U, −(E_t + E_tᵀ) U_t [..., T, d, k].

    Arguments as for `loss`.
    """
    _check("gradient", truths, factors, weight)
    residuals = _residuals(truths, weight, factors)
    return -residuals.sum(-3), -(residuals + residuals.mT) @ factors


def hessian(truths: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    """The Hessian of eq. 14, [..., P, P] with P = d² + T d k: A row by row, then U_1, U_2, ...

    In the direction (H, V) it is Σ_t ‖H + V_t U_tᵀ + U_t V_tᵀ‖_F² − 2 Σ_t ⟨E_t, V_t V_tᵀ⟩.
    Arguments as for `loss`.
    """
    _check("hessian", truths, factors, weight)
    jacobians = _jacobians(factors)
    tasks, entries = jacobians.shape[-3:-1]
    own = _own_blocks(jacobians, _residuals(truths, weight, factors), factors)
    shared = tasks * torch.eye(entries, dtype=truths.dtype, device=truths.device)
    across = jacobians.movedim(-3, -2).flatten(-2)  # [..., d², T d k]
    top = torch.cat([shared.expand(*across.shape[:-2], entries, entries), across], -1)
    return torch.cat([top, torch.cat([across.mT, own], -1)], -2)


def best_weight(truths: Tensor, factors: Tensor) -> Tensor:
    """argmin_A L(A, U) = A* + mean_t (R_t − U_t U_tᵀ), [..., d, d]. Arguments as for `loss`."""
    _check("best_weight", truths, factors)
    return (truths - factors @ factors.mT).mean(-3)


def reduced_loss(truths: Tensor, factors: Tensor) -> Tensor:
    """f(U) = min_A L(A, U), [...]. Arguments as for `loss`."""
    _check("reduced_loss", truths, factors)
    return _centred(truths, factors).square().sum((-3, -2, -1)) / 2


def reduced_gradient(truths: Tensor, factors: Tensor) -> Tensor:
    """The gradient of `reduced_loss`, [..., T, d, k]: eq. 14's in U at the best A."""
    _check("reduced_gradient", truths, factors)
    residuals = _centred(truths, factors)
    return -(residuals + residuals.mT) @ factors


def reduced_hessian(truths: Tensor, factors: Tensor) -> Tensor:
    """The Hessian of `reduced_loss`, [..., T d k, T d k]: U_1 row by row, then U_2, ...

    In the direction V it is Σ_t ‖W_t − mean W‖_F² − 2 Σ_t ⟨E_t, V_t V_tᵀ⟩ with
    W_t = V_t U_tᵀ + U_t V_tᵀ.
    """
    _check("reduced_hessian", truths, factors)
    jacobians = _jacobians(factors)
    across = jacobians.movedim(-3, -2).flatten(-2)
    own = _own_blocks(jacobians, _centred(truths, factors), factors)
    return own - across.mT @ across / factors.shape[-3]


def _residuals(truths: Tensor, weight: Tensor, factors: Tensor) -> Tensor:
    return truths - weight.unsqueeze(-3) - factors @ factors.mT


def _centred(truths: Tensor, factors: Tensor) -> Tensor:
    """E_t at the best A."""
    gaps = truths - factors @ factors.mT
    return gaps - gaps.mean(-3, keepdim=True)


def _jacobians(factors: Tensor) -> Tensor:
    """Of V_t ↦ V_t U_tᵀ + U_t V_tᵀ, [..., T, d², d k]."""
    identity = torch.eye(factors.shape[-2], dtype=factors.dtype, device=factors.device)
    left = torch.einsum("ia,...jb->...ijab", identity, factors)
    return (left + left.transpose(-4, -3)).flatten(-2).flatten(-3, -2)


def _own_blocks(jacobians: Tensor, residuals: Tensor, factors: Tensor) -> Tensor:
    """The part of the Hessian that couples no two tasks, [..., T d k, T d k]."""
    identity = torch.eye(factors.shape[-1], dtype=factors.dtype, device=factors.device)
    symmetric = residuals + residuals.mT
    curved = torch.einsum("...ij,ab->...iajb", symmetric, identity).flatten(-2).flatten(-3, -2)
    blocks = jacobians.mT @ jacobians - curved
    # [..., T, p, p] -> [..., T, p, T, p], zero off the diagonal
    placed = torch.diag_embed(blocks.movedim(-3, -1), dim1=-4, dim2=-2)
    return placed.flatten(-2).flatten(-3, -2)


def _check(function: str, truths: Tensor, factors: Tensor, weight: Tensor | None = None) -> None:
    check_constant(function, "truths", truths)
    check_constant(function, "factors", factors, "truths", truths)
    if truths.dim() < 3 or truths.shape[-1] != truths.shape[-2] or 0 in truths.shape[-3:]:
        raise ValueError(
            f"{function}: truths must be [..., T, d, d] with T, d >= 1, got {list(truths.shape)}"
        )
    tasks, dim = truths.shape[-3:-1]
    if factors.dim() < 3 or factors.shape[-3:-1] != (tasks, dim) or factors.shape[-1] == 0:
        raise ValueError(
            f"{function}: factors must be [..., T={tasks}, d={dim}, k] with k >= 1, "
            f"got {list(factors.shape)}"
        )
    if factors.shape[-1] > dim:
        raise ValueError(
            f"{function}: factors must have k at most d = {dim}, got {factors.shape[-1]}"
        )
    check_finite(function, "truths", truths)
    check_finite(function, "factors", factors)
    if weight is not None:
        shape = (*truths.shape[:-3], dim, dim)
        check_values(function, "weight", weight, "truths", truths, shape)
