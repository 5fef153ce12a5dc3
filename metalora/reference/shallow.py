"""The shallow network's training algorithms, step by step in plain PyTorch (paper, D.2).

The network of task t is ŷ = cᵀ σ((A + B_t A_t) x), σ the elementwise sigmoid; the loss is the mean
of (ŷ − y)² over the samples of all tasks. With h the hidden units, e = ŷ − y and M samples in all,
the gradient of c is 2/M Σ e h, and that of A + B_t A_t is P_t = 2/M diag(c) Σ e h (1 − h) xᵀ over
the samples of task t. So A's is Σ_t P_t, B_t's is P_t A_tᵀ, and A_t's is B_tᵀ P_t.

Every function takes any leading batch dimensions, returns the loss before each epoch's step (an
epoch is one step: all samples at once), and, last, at which epoch (from 1) a training stopped being
finite, or 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def retrain(
    x: Tensor,  # [..., T, N, d]
    y: Tensor,  # [..., T, N]
    weight: Tensor,  # [..., d, d], the start of A
    output: Tensor,  # [..., d], the start of c
    lora_A: Tensor | None,  # [..., T, k, d], the start of A_t; None: standard retraining
    lora_B: Tensor | None,  # [..., T, d, k], the start of B_t
    epochs: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """LoRA-ML (paper, eq. 6) or, without adapters, standard retraining (eq. 1), with AdamW.

    Returns:
        A, c, A_t and B_t ([..., T, 0, d] and [..., T, d, 0] without adapters), losses
        [..., epochs] and the epoch of divergence, int64 [...].
    """
    if lora_A is None or lora_B is None:
        lora_A = x.new_empty(*x.shape[:-2], 0, x.shape[-1])
        lora_B = x.new_empty(*x.shape[:-2], x.shape[-1], 0)
    (lora_A, lora_B, weight, output), losses, diverged_at = _train(
        x,
        y,
        [lora_A, lora_B, weight, output],
        4,
        epochs,
        *(lr, beta1, beta2, eps, weight_decay),
    )
    return weight, output, lora_A, lora_B, losses, diverged_at


def finetune_lora(
    x: Tensor,  # [..., n, d]
    y: Tensor,  # [..., n]
    weight: Tensor,  # [..., d, d], A, frozen
    output: Tensor,  # [..., d], c, frozen
    lora_A: Tensor,  # [..., r, d], the start of A_t
    lora_B: Tensor,  # [..., d, r], the start of B_t
    epochs: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """LoRA on one task (paper, eq. 3) with AdamW.

    Returns:
        A_t, B_t, losses [..., epochs] and the epoch of divergence, int64 [...].
    """
    one_task = [lora_A.unsqueeze(-3), lora_B.unsqueeze(-3), weight, output]
    (lora_A, lora_B, *_), losses, diverged_at = _train(
        x.unsqueeze(-3),
        y.unsqueeze(-2),
        one_task,
        2,
        epochs,
        *(lr, beta1, beta2, eps, weight_decay),
    )
    return lora_A.squeeze(-3), lora_B.squeeze(-3), losses, diverged_at


def predict(
    x: Tensor,  # [..., N, d]
    weight: Tensor,  # [..., d, d]
    output: Tensor,  # [..., d]
) -> Tensor:  # [..., N]
    """cᵀ σ(W x)."""
    return ((x @ weight.mT).sigmoid() @ output.unsqueeze(-1)).squeeze(-1)


def _train(
    x: Tensor,
    y: Tensor,
    parameters: list[Tensor],  # A_t, B_t, A, c
    trained: int,  # so many of them
    epochs: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[list[Tensor], Tensor, Tensor]:
    losses = x.new_empty(*x.shape[:-3], epochs)
    parameters = list(parameters)
    first = [torch.zeros_like(p) for p in parameters]
    second = [torch.zeros_like(p) for p in parameters]
    for epoch in range(1, epochs + 1):
        losses[..., epoch - 1], gradients = _loss_and_gradients(x, y, *parameters)
        step = lr / (1 - beta1**epoch)
        root = math.sqrt(1 - beta2**epoch)
        for i in range(trained):
            g = gradients[i]
            first[i] = first[i] + (1 - beta1) * (g - first[i])
            second[i] = beta2 * second[i] + (1 - beta2) * g * g
            update = first[i] / (second[i].sqrt() / root + eps)
            parameters[i] = (1 - lr * weight_decay) * parameters[i] - step * update
    return parameters, losses, _diverged_at(losses, parameters[:trained])


def _loss_and_gradients(
    x: Tensor, y: Tensor, lora_A: Tensor, lora_B: Tensor, weight: Tensor, output: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    hidden = (x @ (weight.unsqueeze(-3) + lora_B @ lora_A).mT).sigmoid()  # [..., T, N, d]
    c = output[..., None, None, :]
    error = (hidden * c).sum(-1) - y  # [..., T, N]
    scaled = (2 / y.shape[-2:].numel() * error).unsqueeze(-1)
    p = (scaled * hidden * (1 - hidden) * c).mT @ x  # [..., T, d, d]
    gradients = (lora_B.mT @ p, p @ lora_A.mT, p.sum(-3), (scaled * hidden).sum((-3, -2)))
    return error.square().mean((-2, -1)), gradients


def _diverged_at(losses: Tensor, parameters: list[Tensor]) -> Tensor:
    epochs, batch = losses.shape[-1], losses.dim() - 1
    finite = losses.isfinite()
    last = torch.stack([p.isfinite().flatten(batch).all(-1) for p in parameters]).all(0)
    bad = ~torch.cat([finite, last.unsqueeze(-1)], -1)
    first = bad.to(torch.uint8).argmax(-1) + 1
    return torch.where(bad.any(-1), first.clamp_max(epochs), 0)
