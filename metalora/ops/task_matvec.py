"""Matrix-vector products batched over tasks and samples, for small models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import check_float, check_like, check_rank, check_shape
from metalora.ops._native import call, register, usable, where_needed, without_autocast

# Above this many features the BLAS behind torch.bmm is faster than loops that know the shapes.
_SMALL = 64


def task_matvec(weight: Tensor, x: Tensor, lora_U: Tensor | None = None) -> Tensor:
    """y_t = x_t W_tᵀ for every task's own weight, or with W_t = W + U_t U_tᵀ without forming it.

    The symmetric form is the forward model of the paper's linear problem (eq. 14). Differentiable
    any number of times.

    Args:
        weight: [T, out, in]; with ``lora_U``, the shared [d, d].
        x: [T, n, in].
        lora_U: [T, d, k], or None.

    Returns:
        [T, n, out], in the dtype of ``weight``, also under autocast.

    Raises:
        TypeError, ValueError: for shapes, dtypes or devices that do not fit together.
    """
    function = "task_matvec"
    check_float(function, "weight", weight)
    check_shape(function, "x", x, ("T", "n", "in"), (None, None, None))
    tasks, _, in_features = x.shape
    if lora_U is None:
        check_shape(function, "weight", weight, ("T", "out", "in"), (tasks, None, in_features))
    else:
        sizes = (in_features, in_features)
        check_shape(function, "weight", weight, ("d", "d"), sizes)
        check_shape(function, "lora_U", lora_U, ("T", "d", "k"), (tasks, in_features, None))
        check_like(function, "lora_U", lora_U, "weight", weight)
        check_rank(function, "lora_U", lora_U, lora_U.shape[2])
    check_like(function, "x", x, "weight", weight)
    small = max(weight.shape[-1], weight.shape[-2]) <= _SMALL
    full_precision = weight.dtype in (torch.float32, torch.float64)
    if small and full_precision and usable(weight):
        return _TaskMatvec.apply(weight, x, lora_U)
    with without_autocast(weight.device.type):
        return reference.task_matvec(weight, x, lora_U)


class _TaskMatvec(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, x: Tensor, lora_U: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, x, lora_U)
        return call("task_matvec", weight, x, lora_U)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        arguments = (grad_y, *ctx.saved_tensors)
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            with without_autocast(grad_y.device.type):
                gradients = reference.task_matvec_backward(*arguments)
        else:
            gradients = call("task_matvec_backward", *arguments, *needed)
        return tuple(where_needed(needed, gradients))


@register("task_matvec")
def _fake(a: Any) -> Tensor:
    return a.x.new_empty((*a.x.shape[:2], a.weight.shape[-2]))


@register("task_matvec_backward")
def _backward_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    return (
        a.x.new_empty(a.weight.shape if a.need_weight else (0,)),
        a.x.new_empty(a.x.shape if a.need_x else (0,)),
        a.x.new_empty(a.lora_U.shape if a.need_U and a.lora_U is not None else (0,)),
    )
