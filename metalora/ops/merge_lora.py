"""Every task's adapted weight, formed explicitly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._library import native_available
from metalora.ops._arguments import (
    check_float,
    check_like,
    check_rank,
    check_scaling,
    check_shape,
)
from metalora.ops._native import call, register, where_needed


def merge_lora(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float = 1.0) -> Tensor:
    """W_t = W + s · B_t A_t for all tasks at once (paper, eq. 6).

    Differentiable any number of times.

    Args:
        weight: [out, in].
        lora_A: [T, r, in].
        lora_B: [T, out, r].
        scaling: s, usually alpha / r.

    Returns:
        [T, out, in], in the dtype of ``weight``.

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
    if not native_available() or weight.device.type != "cpu":
        return reference.merge_lora(weight, lora_A, lora_B, scaling)
    return _MergeLora.apply(weight, lora_A, lora_B, scaling)


def merge_lora_symmetric(weight: Tensor, lora_U: Tensor) -> Tensor:
    """W_t = W + U_t U_tᵀ for all tasks at once (paper, eq. 14).

    Differentiable any number of times.

    Args:
        weight: [d, d].
        lora_U: [T, d, k].

    Returns:
        [T, d, d], in the dtype of ``weight``.

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit together.
    """
    function = "merge_lora_symmetric"
    check_float(function, "weight", weight)
    check_shape(function, "lora_U", lora_U, ("T", "d", "k"), (None, None, None))
    check_shape(function, "weight", weight, ("d", "d"), (lora_U.shape[1], lora_U.shape[1]))
    check_like(function, "lora_U", lora_U, "weight", weight)
    check_rank(function, "lora_U", lora_U, lora_U.shape[2])
    if not native_available() or weight.device.type != "cpu":
        return reference.merge_lora_symmetric(weight, lora_U)
    return _MergeLoraSymmetric.apply(weight, lora_U)


class _MergeLora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(lora_A, lora_B)
        ctx.scaling = scaling
        return call("merge_lora", weight, lora_A, lora_B, scaling)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        arguments = (grad, *ctx.saved_tensors, ctx.scaling)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            gradients = reference.merge_lora_backward(*arguments)
        else:
            gradients = call("merge_lora_backward", *arguments)
        return *where_needed(ctx.needs_input_grad[:3], gradients), None


class _MergeLoraSymmetric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, lora_U: Tensor) -> Tensor:
        ctx.save_for_backward(lora_U)
        return call("merge_lora_symmetric", weight, lora_U)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (lora_U,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            gradients = reference.merge_lora_symmetric_backward(grad, lora_U)
        else:
            gradients = call("merge_lora_symmetric_backward", grad, lora_U)
        return tuple(where_needed(ctx.needs_input_grad, gradients))


@register("merge_lora")
def _merge_fake(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    return weight.new_empty((lora_A.shape[0], *weight.shape))


@register("merge_lora_backward")
def _merge_backward_fake(
    grad: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        grad.new_empty(grad.shape[1:]),
        lora_A.new_empty(lora_A.shape),
        lora_B.new_empty(lora_B.shape),
    )


@register("merge_lora_symmetric")
def _symmetric_fake(weight: Tensor, lora_U: Tensor) -> Tensor:
    return weight.new_empty((lora_U.shape[0], *weight.shape))


@register("merge_lora_symmetric_backward")
def _symmetric_backward_fake(grad: Tensor, lora_U: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_empty(grad.shape[1:]), lora_U.new_empty(lora_U.shape)
