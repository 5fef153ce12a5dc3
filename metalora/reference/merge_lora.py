"""Every task's adapted weight, formed explicitly."""

from __future__ import annotations

from torch import Tensor


def merge_lora(
    weight: Tensor,  # [out, in]
    lora_A: Tensor,  # [T, r, in]
    lora_B: Tensor,  # [T, out, r]
    scaling: float = 1.0,
) -> Tensor:  # [T, out, in]
    """W_t = W + s · B_t A_t (paper, eq. 6)."""
    return weight + scaling * (lora_B @ lora_A)


def merge_lora_backward(
    grad: Tensor,  # [T, out, in]
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dW = Σ_t P_t, dA_t = s B_tᵀ P_t, dB_t = s P_t A_tᵀ for the gradients P_t of the W_t."""
    return (
        grad.sum(0),
        scaling * (lora_B.transpose(1, 2) @ grad),
        scaling * (grad @ lora_A.transpose(1, 2)),
    )


def merge_lora_symmetric(
    weight: Tensor,  # [d, d]
    lora_U: Tensor,  # [T, d, k]
) -> Tensor:  # [T, d, d]
    """W_t = W + U_t U_tᵀ (paper, eq. 14)."""
    return weight + lora_U @ lora_U.transpose(1, 2)


def merge_lora_symmetric_backward(
    grad: Tensor,  # [T, d, d]
    lora_U: Tensor,
) -> tuple[Tensor, Tensor]:
    """dW = Σ_t P_t and dU_t = (P_t + P_tᵀ) U_t for the gradients P_t of the W_t."""
    return grad.sum(0), (grad + grad.transpose(1, 2)) @ lora_U
