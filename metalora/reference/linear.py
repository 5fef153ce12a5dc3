"""The linear model's training algorithms, step by step in plain PyTorch (paper, section 3 and D.1).

The data enter only through the sufficient statistics of a task: G = Σ x xᵀ, C = Σ y xᵀ and
E = Σ ‖y‖², sums over its N samples. With B = A + U_t U_tᵀ and R_t = B G_t − C_t, the loss
L_t = 1/(2N) Σ ‖y − B x‖² is (⟨B, R_t − C_t⟩ + E_t) / (2N) and its gradient in B is R_t / N.

Every function takes any leading batch dimensions, returns the loss at the point at which each
step's gradient is taken, and, last, at which step (from 1) a training stopped being finite, or 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lora_ml(
    gram: Tensor,  # [..., T, d, d]
    cross: Tensor,  # [..., T, d, d]
    energy: Tensor,  # [..., T]
    weight: Tensor,  # [..., d, d], the start of A
    factors: Tensor,  # [..., T, d, k], the start of U
    count: int,
    outer_steps: int,
    inner_steps: int,
    outer_lr: float,
    inner_lr: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LoRA-ML with symmetric adapters (paper, eq. 14): steps on every U_t, then one on A.

    Returns:
        A, U, losses [..., outer_steps] and the step of divergence, int64 [...].
    """
    tasks = gram.shape[-3]
    losses = energy.new_empty(*energy.shape[:-1], outer_steps)
    for step in range(outer_steps):
        for _ in range(inner_steps):
            residual = _adapted(weight, factors) @ gram - cross
            factors = factors - inner_lr / count * (residual + residual.mT) @ factors
        adapted = _adapted(weight, factors)
        residual = adapted @ gram - cross
        losses[..., step] = _loss(adapted, residual, cross, energy, count).mean(-1)
        weight = weight - outer_lr / (count * tasks) * residual.sum(-3)
    return weight, factors, losses, _diverged_at(losses, weight)


def standard(
    gram: Tensor,  # [..., T, d, d]
    cross: Tensor,  # [..., T, d, d]
    energy: Tensor,  # [..., T]
    weight: Tensor,  # [..., d, d], the start of A
    count: int,
    steps: int,
    lr: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard retraining (paper, eq. 1): gradient descent on A and the mean loss of all tasks.

    Returns:
        A, losses [..., steps] and the step of divergence, int64 [...].
    """
    tasks = gram.shape[-3]
    losses = energy.new_empty(*energy.shape[:-1], steps)
    for step in range(steps):
        shared = weight.unsqueeze(-3)
        residual = shared @ gram - cross
        losses[..., step] = _loss(shared, residual, cross, energy, count).mean(-1)
        weight = weight - lr / (count * tasks) * residual.sum(-3)
    return weight, losses, _diverged_at(losses, weight)


def finetune_lora(
    gram: Tensor,  # [..., d, d]
    cross: Tensor,  # [..., d, d]
    energy: Tensor,  # [...]
    weight: Tensor,  # [..., d, d], A, frozen
    factor_u: Tensor,  # [..., d, r], the start of U
    factor_v: Tensor,  # [..., d, r], the start of V
    truth: Tensor | None,  # [..., d, d]
    count: int,
    steps: int,
    lr: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LoRA on one task (paper, eq. 3): U and V of A + U Vᵀ move at the same time.

    Returns:
        U, V, losses [..., steps], prediction errors before the first and after every step
        [..., steps + 1] ([..., 0] without ``truth``) and the step of divergence, int64 [...].
    """
    losses = energy.new_empty(*energy.shape, steps)
    errors = energy.new_empty(*energy.shape, 0 if truth is None else steps + 1)
    for step in range(steps):
        adapted = weight + factor_u @ factor_v.mT
        residual = adapted @ gram - cross
        losses[..., step] = _loss(adapted, residual, cross, energy, count)
        if truth is not None:
            errors[..., step] = prediction_error(gram, adapted, truth)
        factor_u, factor_v = (
            factor_u - lr / count * residual @ factor_v,
            factor_v - lr / count * residual.mT @ factor_u,
        )
    adapted = weight + factor_u @ factor_v.mT
    if truth is not None:
        errors[..., steps] = prediction_error(gram, adapted, truth)
    return factor_u, factor_v, losses, errors, _diverged_at(losses, adapted)


def prediction_error(
    gram: Tensor,  # [..., d, d]
    weight: Tensor,  # [..., d, d]
    truth: Tensor,  # [..., d, d]
) -> Tensor:  # [...]
    """‖X (W − M)ᵀ‖_F² = ⟨W − M, (W − M) G⟩ on the inputs X that G is made of."""
    gap = weight - truth
    return (gap * (gap @ gram)).sum((-2, -1)).clamp_min(0)


def _adapted(weight: Tensor, factors: Tensor) -> Tensor:
    return weight.unsqueeze(-3) + factors @ factors.mT


def _loss(adapted: Tensor, residual: Tensor, cross: Tensor, energy: Tensor, count: int) -> Tensor:
    return ((adapted * (residual - cross)).sum((-2, -1)) + energy) / (2 * count)


def _diverged_at(
    losses: Tensor,  # [..., steps]
    result: Tensor,  # [..., d, d]
) -> Tensor:  # int64 [...]
    steps = losses.shape[-1]
    bad = ~torch.cat([losses, result.sum((-2, -1)).unsqueeze(-1)], -1).isfinite()
    first = bad.to(torch.uint8).argmax(-1) + 1
    return torch.where(bad.any(-1), first.clamp_max(steps), 0)
