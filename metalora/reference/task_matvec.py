"""Matrix-vector products batched over tasks and samples, for small models."""

from __future__ import annotations

from torch import Tensor


def task_matvec(
    weight: Tensor,  # [T, out, in], or [d, d] with lora_U
    x: Tensor,  # [T, n, in]
    lora_U: Tensor | None = None,  # [T, d, k]
) -> Tensor:  # [T, n, out]
    """y_t = x_t W_tᵀ; with ``lora_U``, W_t = W + U_t U_tᵀ (paper, eq. 14) is not formed."""
    if lora_U is None:
        return x @ weight.transpose(1, 2)
    return x @ weight.T + (x @ lora_U) @ lora_U.transpose(1, 2)


def task_matvec_backward(
    grad_y: Tensor,  # [T, n, out]
    weight: Tensor,
    x: Tensor,
    lora_U: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `task_matvec` for weight, x and lora_U, themselves differentiable."""
    if lora_U is None:
        return grad_y.transpose(1, 2) @ x, grad_y @ weight, None
    grad_weight = grad_y.flatten(0, 1).T @ x.flatten(0, 1)
    grad_x = grad_y @ weight + (grad_y @ lora_U) @ lora_U.transpose(1, 2)
    grad_U = grad_y.transpose(1, 2) @ (x @ lora_U) + x.transpose(1, 2) @ (grad_y @ lora_U)
    return grad_weight, grad_x, grad_U
