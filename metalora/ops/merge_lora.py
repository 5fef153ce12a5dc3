"""Every task's adapted weight, formed explicitly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import (
    SHORT,
    check_float,
    check_like,
    check_rank,
    check_scaling,
    check_shape,
)
from metalora.ops._native import (
    call,
    register,
    tf32_allowed,
    usable,
    where_needed,
    without_autocast,
)


def merge_lora(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float = 1.0,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """W_t = W + s · B_t A_t for all tasks at once (paper, eq. 6).

    Differentiable any number of times.

    Args:
        weight: [out, in].
        lora_A: [T, r, in].
        lora_B: [T, out, r].
        scaling: s, usually alpha / r.
        dtype: of the result: that of ``weight`` (None), or bfloat16 or float16 where that is
            float32, rounded once, with the update in.

    Returns:
        [T, out, in].

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit together.
    """
    function = "merge_lora"
    check_float(function, "weight", weight)
    check_shape(function, "weight", weight, ("out", "in"), (None, None))
    out_features, in_features = weight.shape
    check_shape(function, "lora_A", lora_A, ("T", "r", "in"), (None, None, in_features))
    tasks, rank = lora_A.shape[0], lora_A.shape[1]
    check_shape(function, "lora_B", lora_B, ("T", "out", "r"), (tasks, out_features, rank))
    check_like(function, "lora_A", lora_A, "weight", weight)
    check_like(function, "lora_B", lora_B, "weight", weight)
    check_rank(function, "lora_A", lora_A, rank)
    scaling = check_scaling(function, scaling)
    dtype = _check_dtype(function, dtype, weight)
    if not usable(weight):
        with without_autocast(weight.device.type):
            return reference.merge_lora(weight, lora_A, lora_B, scaling).to(dtype)
    return _MergeLora.apply(weight, lora_A, lora_B, scaling, dtype)


def merge_lora_symmetric(
    weight: Tensor, lora_U: Tensor, *, dtype: torch.dtype | None = None
) -> Tensor:
    """W_t = W + U_t U_tᵀ for all tasks at once (paper, eq. 14).

    Differentiable any number of times.

    Args:
        weight: [d, d].
        lora_U: [T, d, k].
        dtype: of the result, see `merge_lora`.

    Returns:
        [T, d, d].

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit together.
    """
    function = "merge_lora_symmetric"
    check_float(function, "weight", weight)
    check_shape(function, "lora_U", lora_U, ("T", "d", "k"), (None, None, None))
    check_shape(function, "weight", weight, ("d", "d"), (lora_U.shape[1], lora_U.shape[1]))
    check_like(function, "lora_U", lora_U, "weight", weight)
    check_rank(function, "lora_U", lora_U, lora_U.shape[2])
    dtype = _check_dtype(function, dtype, weight)
    if not usable(weight):
        with without_autocast(weight.device.type):
            return reference.merge_lora_symmetric(weight, lora_U).to(dtype)
    return _MergeLoraSymmetric.apply(weight, lora_U, dtype)


def _check_dtype(function: str, dtype: torch.dtype | None, weight: Tensor) -> torch.dtype:
    if dtype is None or dtype == weight.dtype:
        return weight.dtype
    if weight.dtype == torch.float32 and dtype in SHORT:
        return dtype
    raise TypeError(
        f"{function}: dtype must be that of weight, {weight.dtype}, or torch.bfloat16 or "
        f"torch.float16 where that is torch.float32, got {dtype}"
    )


class _MergeLora(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling = scaling
        tf32 = tf32_allowed(dtype, weight.is_cuda)
        return call("merge_lora", weight, lora_A, lora_B, scaling, dtype, tf32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        lora_A, lora_B = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            grad = grad.to(lora_A.dtype)
            with without_autocast(grad.device.type):
                gradients = reference.merge_lora_backward(grad, lora_A, lora_B, ctx.scaling)
        else:
            tf32 = tf32_allowed(grad.dtype, grad.is_cuda)
            gradients = call("merge_lora_backward", grad, lora_A, lora_B, ctx.scaling, tf32)
        return *where_needed(ctx.needs_input_grad[:3], gradients), None, None


class _MergeLoraSymmetric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_U: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(lora_U)
        tf32 = tf32_allowed(dtype, weight.is_cuda)
        return call("merge_lora_symmetric", weight, lora_U, dtype, tf32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (lora_U,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            with without_autocast(grad.device.type):
                gradients = reference.merge_lora_symmetric_backward(grad.to(lora_U.dtype), lora_U)
        else:
            tf32 = tf32_allowed(grad.dtype, grad.is_cuda)
            gradients = call("merge_lora_symmetric_backward", grad, lora_U, tf32)
        return *where_needed(ctx.needs_input_grad[:2], gradients), None


@register("merge_lora", "merge_lora_symmetric")
def _merge_fake(a: Any) -> Tensor:
    tasks = (a.lora_U if hasattr(a, "lora_U") else a.lora_A).shape[0]
    return a.weight.new_empty((tasks, *a.weight.shape), dtype=a.dtype)


@register("merge_lora_backward")
def _merge_backward_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_weight = a.lora_A.new_empty(a.grad.shape[1:])
    return grad_weight, a.lora_A.new_empty(a.lora_A.shape), a.lora_B.new_empty(a.lora_B.shape)


@register("merge_lora_symmetric_backward")
def _symmetric_backward_fake(a: Any) -> tuple[Tensor, Tensor]:
    return a.lora_U.new_empty(a.grad.shape[1:]), a.lora_U.new_empty(a.lora_U.shape)
