"""The multi-task LoRA linear layer: all tasks in one call, with the shared weight trainable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import (
    SHORT,
    check_float,
    check_like,
    check_probability,
    check_scaling,
    check_shape,
)
from metalora.ops._native import (
    autocast,
    autocasting,
    call,
    register,
    tf32_allowed,
    usable,
    where_needed,
)
from metalora.ops.dropout import seed_tensor
from metalora.ops.route import (
    ROUTE_OF,
    check_route,
    decide,
    keeps_merged,
    memory_of,
    rows_each,
    takes_small_kernels,
)
from metalora.ops.task_matvec import task_matvec

# x, weight, bias, lora_A, lora_B, task_ptr
_Layer = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    route: str = "auto",
    keep_merged: bool = False,
) -> Tensor:
    """y_t = x_t Wᵀ + b + s · drop(x_t) A_tᵀ B_tᵀ for the rows x_t of every task t (paper, eq. 6).

    Differentiable any number of times in x, weight, bias, lora_A and lora_B. Under the transforms
    of `torch.func` (grad, vmap, jvp, …) and in forward mode, route="auto" takes "reference", and
    native routes are refused. Under autocast, x and bias are cast to its dtype, and so are the
    weights once the LoRA update is in.

    Args:
        x: [M, in], rows sorted by task.
        weight: [out, in], shared by all tasks.
        bias: [out] or None.
        lora_A: [T, r, in].
        lora_B: [T, out, r].
        task_ptr: int64 [T + 1]; rows ``task_ptr[t]:task_ptr[t + 1]`` belong to task t. Starts at 0,
            ends at M, never decreases; empty tasks are legal. On the CPU, also for x on a GPU: one
            on the GPU is read back first, for which the host waits.
        scaling: s, usually alpha / r; finite.
        dropout_p: probability in [0, 1) to drop an element of x on its way into the LoRA branch.
        seed: int in [0, 2**63) or int64 scalar tensor that fixes the dropout mask (see
            `dropout_mask`); None draws one from torch's generator, so `torch.manual_seed` makes
            runs repeat.
        route: "weight" forms every W_t = W + s B_t A_t (no dropout), "token" adds the LoRA branch
            row by row, "reference" is plain PyTorch, "auto" chooses (see `lora_linear_route`).
        keep_merged: let the weight route keep every W_t for backward, [T, out, in] in the dtype of
            x, rather than make it again. On a GPU those that take at most an eighth of x are kept
            in any case.

    Returns:
        [M, out], in the dtype of x.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing is computed then.
        RuntimeError: if a native route is asked for that cannot be had here, or task_ptr is on
            the GPU while a CUDA graph is captured.
    """
    layer = (x, weight, bias, lora_A, lora_B, task_ptr)
    try:
        short = route == "auto" and dropout_p == 0 and usable(x)
        if short and takes_small_kernels(x, weight, task_ptr):
            scaling = check_scaling("lora_linear", scaling)
            return _WeightRoute.apply(*layer, scaling, False, keep_merged, False)
        return _run(layer, scaling, dropout_p, seed, route, keep_merged)[0]
    except Exception:
        # The raw operator checks its arguments as well: the slow Python checks run only after a
        # failure, to word the error. They would cost as much as a small layer.
        _explain(layer)
        raise


def lora_linear_handing_on(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    *,
    scaling: float = 1.0,
    dropout_p: float = 0.0,
    route: str = "auto",
    keep_merged: bool = False,
) -> tuple[Tensor, Tensor]:
    """`lora_linear`, and the x that the next layer which reads it should be given.

    It is in autocast's dtype, so that it is cast once for all layers. The gradient that comes back
    through this x is added to this layer's where that is computed, and autograd has nothing left to
    add; but by the weight route with unequally many rows for each task it adds as ever. Since a
    gradient may be written to, this x is for nothing but layers that go through this function.
    """
    layer = (x, weight, bias, lora_A, lora_B, task_ptr)
    try:
        return _run(layer, scaling, dropout_p, None, route, keep_merged, hands_on=True)
    except Exception:
        _explain(layer)
        raise


def lora_linear_symmetric(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_U: Tensor,
    task_ptr: Tensor,
    *,
    scaling: float = 1.0,
    route: str = "auto",
    keep_merged: bool = False,
) -> Tensor:
    """y_t = x_t (W + s · U_t U_tᵀ)ᵀ + b for the rows x_t of every task t (paper, eq. 14).

    As `lora_linear` with A_tᵀ = B_t = U_t, of which its kernels make no copies; layers of at most
    64 features with equally many rows for each task take `task_matvec` on a GPU.

    Args:
        x: [M, d], rows sorted by task.
        weight: [d, d], shared by all tasks.
        bias: [d] or None.
        lora_U: [T, d, k].
        task_ptr, scaling, route, keep_merged: see `lora_linear`; s must not be negative.

    Returns:
        [M, d], in the dtype of x.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`, where U_tᵀ is called lora_A and U_t
            lora_B.
    """
    name = "lora_linear_symmetric"
    check_float(name, "lora_U", lora_U)
    check_shape(name, "lora_U", lora_U, ("T", "d", "k"), (None, None, None))
    d = lora_U.shape[1]
    check_shape(name, "weight", weight, ("d", "d"), (d, d))
    if check_scaling(name, scaling) < 0:
        raise ValueError(f"{name}: scaling must be >= 0, got {scaling}")
    layer = (x, weight, bias, lora_U.mT, lora_U, task_ptr)
    try:
        rows = rows_each(x, weight, task_ptr) if route == "auto" else 0
        if rows:
            factor = lora_U if scaling == 1 else lora_U * math.sqrt(scaling)
            y = task_matvec(weight, x.reshape(-1, rows, d), factor).reshape(-1, d)
            return y if bias is None else y + bias
        return _run(layer, scaling, 0.0, None, route, keep_merged, lora_U)[0]
    except Exception:
        _explain(layer)
        raise


def _run(
    layer: _Layer,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    route: str,
    keep_merged: bool,
    lora_U: Tensor | None = None,
    hands_on: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `lora_linear` does, and x for the next layer, see `lora_linear_handing_on`.

    With ``lora_U``, lora_A and lora_B are its transpose and itself.
    """
    x, weight, bias, lora_A, lora_B, task_ptr = layer
    device_type = x.device.type
    if autocasting(device_type):
        x, bias = autocast(x), None if bias is None else autocast(bias)
    scaling = check_scaling("lora_linear", scaling)
    if dropout_p != 0:
        dropout_p = check_probability("lora_linear", "dropout_p", dropout_p)
        seed = seed_tensor("lora_linear", seed, x.device)
    else:
        dropout_p, seed = 0.0, None
    if route == "auto":
        out_features, in_features = weight.shape
        rows, tasks = x.shape[0], lora_A.shape[0]
        # CUDA kernels take a matrix without columns, whose address is null, for one not given.
        native = usable(x) and not (x.is_cuda and 0 in weight.shape)
        decision = decide(
            *(rows, tasks, out_features, in_features, dropout_p),
            *(x.dtype, weight.dtype, device_type, native, memory_of(x) if native else None),
        )
        route = ROUTE_OF[decision]
    elif route != "reference":
        check_route(route, x, dropout_p)
    if weight.dtype == torch.float32 and x.dtype in SHORT and route != "weight":
        # The weight route rounds once, after the update is in; the others need equal dtypes.
        weight, lora_A, lora_B = weight.to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype)
    if route == "reference" or not (x.is_cpu and task_ptr.is_cpu):
        _check((x, weight, bias, lora_A, lora_B, task_ptr))
        task_ptr = _on_host(task_ptr)
    layer = (x, weight, bias, lora_A, lora_B, task_ptr)
    if route == "reference":
        _check_values(task_ptr, x.shape[0])
        return reference.lora_linear(*layer, scaling, dropout_p, seed), x
    if route == "weight":  # on the CPU the raw operators check their arguments
        small = x.is_cuda and keeps_merged(x.shape[0], lora_A.shape[0], weight.shape[0])
        settings = scaling, tf32_allowed(x.dtype, x.is_cuda), keep_merged or small
        adapters = (lora_A if lora_U is None else None, lora_B)
        given = (x, weight, bias, *adapters, task_ptr, *settings)
        if hands_on and x.requires_grad and _has_equal_rows(task_ptr):
            return _WeightRoute.apply(*given, True)
        return _WeightRoute.apply(*given, False), x
    tf32, shares = tf32_allowed(x.dtype, x.is_cuda), hands_on and x.requires_grad
    result = _TokenRoute.apply(*layer, scaling, dropout_p, seed, tf32, shares)
    return result if shares else (result, x)


def _has_equal_rows(task_ptr: Tensor) -> bool:
    """Whether every task has equally many rows, and not none."""
    counts = set(task_ptr.diff().tolist())
    return len(counts) == 1 and counts != {0}


def _on_host(task_ptr: Tensor) -> Tensor:
    """The task pointers on the CPU; reads them back from a GPU, for which the host waits."""
    if task_ptr.is_cpu:
        return task_ptr
    if _capturing():
        raise RuntimeError(
            f"lora_linear: task_ptr must be on the CPU while a CUDA graph is captured, got it on "
            f"{task_ptr.device}, from where it would have to be read back; make it on the CPU"
        )
    return task_ptr.cpu()


def _capturing() -> bool:
    return not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


class _WeightRoute(torch.autograd.Function):
    """With lora_A None, A_tᵀ = B_t = U_t.

    With ``hands_on``, x is a result too, to whose gradient that of x is added in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor,
        task_ptr: Tensor,
        scaling: float,
        tf32: bool,
        keep_merged: bool,
        hands_on: bool,
    ) -> Any:
        ctx.settings = scaling, tf32
        merged = _merged(weight, lora_A, lora_B, x.dtype, *ctx.settings) if keep_merged else None
        ctx.save_for_backward(x, weight, lora_A, lora_B, task_ptr, merged)
        name, adapters = _weight_operator(lora_A, lora_B)
        y = call(name, x, weight, bias, *adapters, task_ptr, scaling, merged, tf32)
        if not hands_on:
            return y
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_x: Tensor | None = None) -> Any:
        if grad_y is None:  # of what was saved nothing is looked at: it may have been changed
            return grad_x, *[None] * 9
        x, weight, lora_A, lora_B, task_ptr, merged = ctx.saved_tensors
        scaling, tf32 = ctx.settings
        needed, symmetric = ctx.needs_input_grad[:5], lora_A is None
        if torch.is_grad_enabled():
            whole = x, weight, lora_B.mT if symmetric else lora_A, lora_B, task_ptr
            exact = _exact((True,) * 5, grad_y, whole, scaling)
            own, grad_W, grad_b, grad_A, grad_B = exact[:5]
            if grad_x is not None:
                own = own + grad_x
            if symmetric:
                grad_B = grad_A.mT + grad_B
            return *where_needed(needed, (own, grad_W, grad_b, grad_A, grad_B)), *[None] * 5
        if grad_x is not None:
            if merged is None:
                merged = _merged(weight, lora_A, lora_B, x.dtype, scaling, tf32)
            grad_x, tasks = grad_x.contiguous(), lora_B.shape[0]
            of_tasks = grad_x.view(tasks, -1, x.shape[1])
            of_tasks.baddbmm_(grad_y.reshape(tasks, -1, weight.shape[0]), merged)
        name, adapters = _weight_operator(lora_A, lora_B)
        asked = (needed[0] and grad_x is None, *needed[1:3], *needed[3 + symmetric :])
        layer = x, weight, *adapters, task_ptr
        found = call(f"{name}_backward", grad_y, *layer, scaling, merged, tf32, *asked)
        own, *others = where_needed(asked, found)
        if symmetric:
            others.insert(2, None)
        return own if grad_x is None else grad_x, *others, *[None] * 5


def _weight_operator(lora_A: Tensor | None, lora_B: Tensor) -> tuple[str, tuple[Tensor, ...]]:
    """The operator's name, and its adapters."""
    if lora_A is None:
        return "lora_linear_symmetric", (lora_B,)
    return "lora_linear_weight", (lora_A, lora_B)


def _merged(
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor,
    dtype: torch.dtype,
    scaling: float,
    tf32: bool,
) -> Any:
    """W_t of every task, [T, out, in] in this dtype."""
    if lora_A is None and scaling == 1:
        return call("merge_lora_symmetric", weight, lora_B, dtype, tf32)
    lora_A = lora_B.mT if lora_A is None else lora_A
    return call("merge_lora", weight, lora_A, lora_B, scaling, dtype, tf32)


class _TokenRoute(torch.autograd.Function):
    """With ``hands_on``, x is a result too, and what comes back through it is added to x's own."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *given, hands_on = arguments
        x, weight, _, lora_A, lora_B, task_ptr, scaling, dropout_p, seed, tf32 = given
        y, shrunk, kept = call("lora_linear_token", *given)
        ctx.save_for_backward(x, weight, lora_A, lora_B, task_ptr, shrunk, kept, seed)
        ctx.scaling, ctx.dropout_p, ctx.tf32 = scaling, dropout_p, tf32
        if not hands_on:
            return y
        ctx.set_materialize_grads(False)
        return y, x

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, grad_x: Tensor | None = None) -> Any:
        if grad_y is None:  # of what was saved nothing is looked at: it may have been changed
            return grad_x, *[None] * 10
        *layer, shrunk, kept, seed = ctx.saved_tensors
        settings, needed = (ctx.scaling, ctx.dropout_p, seed), ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():
            own, *others = _exact(needed, grad_y, layer, *settings)
            return own if grad_x is None else own + grad_x, *others, None, None
        name = "lora_linear_token_backward"
        found = call(name, grad_y, *layer, shrunk, kept, *settings, ctx.tf32, *needed, grad_x)
        return *where_needed(needed, found), *[None] * 6


def _exact(
    needed: tuple[bool, ...], grad_y: Tensor, layer: Sequence[Tensor], *settings: Any
) -> tuple[Any, ...]:
    """What backward returns with create_graph=True: gradients that can be differentiated."""
    x, weight, lora_A, lora_B, task_ptr = layer
    wide = weight.dtype  # at least as wide as that of x
    exact = reference.lora_linear_backward(
        *(grad_y.to(wide), x.to(wide), weight, lora_A, lora_B, task_ptr), *settings
    )
    dtypes = (x.dtype, wide, grad_y.dtype, wide, wide)
    gradients = tuple(g.to(d) for g, d in zip(exact, dtypes, strict=True))
    return *where_needed(needed, gradients), None, None, None, None


@register("lora_linear_weight", "lora_linear_symmetric")
def _weight_fake(a: Any) -> Tensor:
    return a.x.new_empty((a.x.shape[0], a.weight.shape[0]))


@register("lora_linear_token")
def _token_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    # On the CPU what is kept for backward is no shorter than a float; on a GPU it is as x is.
    dtype = torch.float32 if a.x.is_cpu and a.x.dtype in SHORT else a.x.dtype
    rows, in_features = a.x.shape
    bits = (rows, (in_features + 63) // 64 * 8) if a.dropout_p > 0 else (0,)
    shrunk = a.x.new_empty((rows, a.lora_A.shape[1]), dtype=dtype)
    return _weight_fake(a), shrunk, a.x.new_empty(bits, dtype=torch.uint8)


@register("lora_linear_weight_backward", "lora_linear_token_backward")
def _backward_fake(a: Any) -> tuple[Tensor, ...]:
    return (
        a.x.new_empty(a.x.shape if a.need_x else (0,)),
        a.weight.new_empty(a.weight.shape if a.need_weight else (0,)),
        a.x.new_empty(a.weight.shape[:1] if a.need_bias else (0,)),
        a.lora_A.new_empty(a.lora_A.shape if a.need_A else (0,)),
        a.lora_B.new_empty(a.lora_B.shape if a.need_B else (0,)),
    )


@register("lora_linear_symmetric_backward")
def _symmetric_backward_fake(a: Any) -> tuple[Tensor, ...]:
    return (
        a.x.new_empty(a.x.shape if a.need_x else (0,)),
        a.weight.new_empty(a.weight.shape if a.need_weight else (0,)),
        a.x.new_empty(a.weight.shape[:1] if a.need_bias else (0,)),
        a.lora_U.new_empty(a.lora_U.shape if a.need_U else (0,)),
    )


def _check(layer: _Layer) -> None:
    """Raises if shapes, dtypes or devices do not fit together."""
    x, weight, bias, lora_A, lora_B, task_ptr = layer
    name = "lora_linear"
    check_float(name, "x", x)
    check_float(name, "weight", weight)
    check_shape(name, "weight", weight, ("out", "in"), (None, None))
    out_features, in_features = weight.shape
    check_shape(name, "x", x, ("M", "in"), (None, in_features))
    check_float(name, "lora_A", lora_A)
    check_shape(name, "lora_A", lora_A, ("T", "r", "in"), (None, None, in_features))
    tasks, rank, _ = lora_A.shape
    if tasks == 0 or rank == 0:
        raise ValueError(
            f"{name}: lora_A must have at least one task and a rank of at least 1, got "
            f"{list(lora_A.shape)}"
        )
    check_float(name, "lora_B", lora_B)
    check_shape(name, "lora_B", lora_B, ("T", "out", "r"), (tasks, out_features, rank))
    short = weight.dtype == torch.float32 and x.dtype in SHORT  # as under autocast
    if x.dtype != weight.dtype and not (short and (bias is None or bias.dtype == x.dtype)):
        raise TypeError(dtypes_differ(name, x, weight))
    if bias is not None:
        check_like(name, "bias", bias, "x", x)
        check_shape(name, "bias", bias, ("out",), (out_features,))
    if not isinstance(task_ptr, Tensor) or task_ptr.dtype != torch.int64:
        got = task_ptr.dtype if isinstance(task_ptr, Tensor) else type(task_ptr).__name__
        grad = " that requires grad" if getattr(task_ptr, "requires_grad", False) else ""
        raise TypeError(
            f"{name}: task_ptr must be an int64 tensor [T+1={tasks + 1}] of row offsets, got "
            f"{got}{grad}; row counts become offsets with torch.cumsum"
        )
    check_shape(name, "task_ptr", task_ptr, ("T+1",), (tasks + 1,))
    check_like(name, "weight", weight, "x", x, dtype=False)
    for argument, factor in (("lora_A", lora_A), ("lora_B", lora_B)):
        check_like(name, argument, factor, "weight", weight, dtype=False)
        if factor.dtype != weight.dtype:
            raise TypeError(
                f"{name}: {argument} must have the dtype of weight, {weight.dtype}, got "
                f"{factor.dtype}; keep both in float32 (model.float()) and compute in a short "
                "dtype with torch.autocast, or convert one of them with .to()"
            )
    if not task_ptr.is_cpu and task_ptr.device != x.device:
        raise ValueError(
            f"{name}: task_ptr must be on the CPU, or on the device of x, {x.device}, got "
            f"{task_ptr.device}; move it with .cpu()"
        )


def dtypes_differ(where: str, x: Tensor, weight: Tensor) -> str:
    """What an error says if x and weight have dtypes that do not go together."""
    return (
        f"{where}: x must have the dtype of weight, {weight.dtype}, got {x.dtype}; convert one of "
        "them with .to(), or compute under torch.autocast"
    )


def _explain(layer: Any) -> None:
    """Raises what the checks find wrong, if anything; x and bias are as under autocast."""
    x, weight, bias, lora_A, lora_B, task_ptr = layer
    try:
        if isinstance(x, Tensor) and autocasting(x.device.type):
            x, bias = autocast(x), autocast(bias) if isinstance(bias, Tensor) else bias
        _check((x, weight, bias, lora_A, lora_B, task_ptr))
        if task_ptr.is_cpu or not _capturing():  # a captured stream must not be waited for
            _check_values(task_ptr, x.shape[0])
    except (TypeError, ValueError) as error:
        raise error from None


def _check_values(task_ptr: Tensor, rows: int) -> None:
    if torch.compiler.is_compiling():
        return
    bounds = task_ptr.tolist()
    if bounds[0] != 0 or bounds[-1] != rows:
        raise ValueError(
            f"lora_linear: task_ptr must start at 0 and end at M={rows}, got {bounds[0]} and "
            f"{bounds[-1]}"
        )
    if bounds != sorted(bounds):
        where = next(t for t in range(len(bounds) - 1) if bounds[t] > bounds[t + 1])
        raise ValueError(
            f"lora_linear: task_ptr must not decrease, but task_ptr[{where}]={bounds[where]} is "
            f"above task_ptr[{where + 1}]={bounds[where + 1]}; sort the rows of x by task"
        )
