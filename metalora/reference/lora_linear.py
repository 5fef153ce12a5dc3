"""The multi-task LoRA linear layer, one task after the other."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from metalora.reference.dropout import dropout_mask


def lora_linear(
    x: Tensor,  # [M, in], rows sorted by task
    weight: Tensor,  # [out, in]
    bias: Tensor | None,  # [out]
    lora_A: Tensor,  # [T, r, in]
    lora_B: Tensor,  # [T, out, r]
    task_ptr: Tensor,  # int64 [T + 1]
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:  # [M, out]
    """y_t = x_t Wᵀ + b + s · drop(x_t) A_tᵀ B_tᵀ for the rows x_t of each task t (eq. 6)."""
    branch = _dropped(x, dropout_p, seed)
    updates = [
        branch[rows] @ a.T @ b.T
        for rows, a, b in zip(_slices(task_ptr), lora_A, lora_B, strict=True)
    ]
    return F.linear(x, weight, bias) + scaling * torch.cat(updates)


def lora_linear_backward(
    grad_y: Tensor,  # [M, out]
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear` for x, weight, bias, lora_A and lora_B, differentiable."""
    branch = _dropped(x, dropout_p, seed)
    grad_branch, grad_A, grad_B = [], [], []
    for rows, a, b in zip(_slices(task_ptr), lora_A, lora_B, strict=True):
        shrunk = branch[rows] @ a.T  # [m_t, r]
        grad_shrunk = scaling * (grad_y[rows] @ b)  # [m_t, r]
        grad_branch.append(grad_shrunk @ a)
        grad_A.append(grad_shrunk.T @ branch[rows])
        grad_B.append(scaling * (grad_y[rows].T @ shrunk))
    grad_x = grad_y @ weight + _dropped(torch.cat(grad_branch), dropout_p, seed)
    return grad_x, grad_y.T @ x, grad_y.sum(0), torch.stack(grad_A), torch.stack(grad_B)


def _slices(task_ptr: Tensor) -> list[slice]:
    bounds = task_ptr.tolist()
    return [slice(start, end) for start, end in pairwise(bounds)]


def _dropped(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    """Drops elements of x [M, in] and scales the others by 1 / (1 - p); p = 0 changes nothing."""
    if p == 0:
        return x
    assert seed is not None
    keep = dropout_mask(seed.to(x.device), p, x.shape[0], x.shape[1])
    return torch.where(keep, x / (1 - p), 0)
