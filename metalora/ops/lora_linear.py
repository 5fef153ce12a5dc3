"""The multi-task LoRA linear layer: all tasks in one call, with the shared weight trainable."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import (
    FLOATS,
    SHORT,
    check_choice,
    check_float,
    check_like,
    check_scaling,
    check_shape,
)
from metalora._library import cpu_status, gpu_memory, gpu_problem
from metalora._transforms import transformed
from metalora.ops._native import call, register, tf32_allowed, usable, where_needed
from metalora.ops.dropout import check_probability, seed_tensor

ROUTES = ("auto", "weight", "token", "reference")

# The weight route wins once a task has more rows than, on a CPU, this many times
# in * out / (in + out), where the two were measured to cross (`python -m benchmarks.lora_linear
# --cases routes --baselines routes`); on a GPU, this many times sqrt(in * out), where their
# memory traffic is equal.
_CPU_WEIGHT_FROM = 8.0
_CUDA_WEIGHT_FROM = 2.0
_SMALL = {torch.float32: 64, torch.float64: 32}  # kSmall of csrc/cpu/small_product.h
# Of a GPU's memory the weight route takes at most this part for the W_t and their gradients.
_MEMORY_SHARE = 1 / 8


class RouteChoice(NamedTuple):
    """How `lora_linear` computes, and why."""

    route: str  # "weight", "token" or "reference"
    reason: str


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
            x, rather than make it again.

    Returns:
        [M, out], in the dtype of x.

    Raises:
        TypeError, ValueError: for arguments that do not fit together; nothing is computed then.
        RuntimeError: if a native route is asked for that cannot be had here, or task_ptr is on
            the GPU while a CUDA graph is captured.
    """
    try:
        return _run(
            *(x, weight, bias, lora_A, lora_B, task_ptr),
            *(scaling, dropout_p, seed, route, keep_merged),
        )
    except Exception:
        # The raw operator checks its arguments as well, so what is wrong with them is only put
        # into words once something is: in Python the checks would cost as much as a small layer.
        problem = _problem(x, weight, bias, lora_A, lora_B, task_ptr)
        if problem is not None:
            raise problem from None
        raise


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float,
    dropout_p: float,
    seed: int | Tensor | None,
    route: str,
    keep_merged: bool,
) -> Tensor:
    device_type = x.device.type
    if _autocasting(device_type):
        x, bias = _autocast(x), None if bias is None else _autocast(bias)
    scaling = check_scaling("lora_linear", scaling)
    if dropout_p != 0:
        dropout_p = check_probability("lora_linear", "dropout_p", dropout_p)
        seed = seed_tensor("lora_linear", seed, x.device)
    else:
        dropout_p, seed = 0.0, None
    if route == "auto":
        out_features, in_features = weight.shape
        rows, tasks, native = x.shape[0], lora_A.shape[0], usable(x)
        decision = _decide(
            *(rows, tasks, out_features, in_features, dropout_p),
            *(x.dtype, weight.dtype, device_type, native, _memory(x) if native else None),
        )
        route = _ROUTE_OF[decision]
    elif route != "reference":
        _check_route(route, x, dropout_p)
    if weight.dtype == torch.float32 and x.dtype in SHORT and route != "weight":
        # The weight route rounds once, after the update is in; the others need equal dtypes.
        weight, lora_A, lora_B = weight.to(x.dtype), lora_A.to(x.dtype), lora_B.to(x.dtype)
    if route == "reference":
        _check(x, weight, bias, lora_A, lora_B, task_ptr)
        task_ptr = _on_host(task_ptr)
        _check_values(task_ptr, x.shape[0])
        return reference.lora_linear(
            x, weight, bias, lora_A, lora_B, task_ptr, scaling, dropout_p, seed
        )
    # Neither the dispatcher nor the kernels check that devices match.
    together = weight.is_cpu and lora_A.is_cpu and lora_B.is_cpu and task_ptr.is_cpu
    if not together or (bias is not None and not bias.is_cpu):
        _check(x, weight, bias, lora_A, lora_B, task_ptr)
    task_ptr = _on_host(task_ptr)  # the raw operator checks its values
    if route == "weight":
        return _WeightRoute.apply(
            x, weight, bias, lora_A, lora_B, task_ptr, scaling, tf32_allowed(x.dtype), keep_merged
        )
    return _TokenRoute.apply(x, weight, bias, lora_A, lora_B, task_ptr, scaling, dropout_p, seed)


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


def lora_linear_route(
    x: Tensor, weight: Tensor, lora_A: Tensor, *, dropout_p: float = 0.0
) -> RouteChoice:
    """The route that ``lora_linear(..., route="auto")`` takes for these tensors, and why.

    Args:
        x: [M, in].
        weight: [out, in].
        lora_A: [T, r, in].
        dropout_p: probability in [0, 1) to drop an element on the LoRA branch.
    """
    check_float("lora_linear_route", "x", x)
    device_type = x.device.type
    if _autocasting(device_type):
        x = _autocast(x)
    return choose_route(
        rows=x.shape[0],
        tasks=lora_A.shape[0],
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        dropout_p=dropout_p,
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        device_type=device_type,
        problem=_problem_of_device(x),
        memory=_memory(x),
    )


def choose_route(
    *,
    rows: int,
    tasks: int,
    in_features: int,
    out_features: int,
    dropout_p: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None = None,
    device_type: str,
    problem: str | None = None,
    memory: int | None = None,
) -> RouteChoice:
    """The choice behind route="auto": a pure function of what it is told.

    Args:
        rows: M, over all tasks.
        tasks: T.
        in_features, out_features: of the layer.
        dropout_p: dropout on the LoRA branch.
        dtype: of x.
        weight_dtype: of the parameters; None means that of x.
        device_type: "cpu", "cuda", ….
        problem: why there are no native kernels for that device; None if there are.
        memory: bytes that the weight route may take on a GPU for all W_t and their gradients;
            None for any number.
    """
    weight_dtype = dtype if weight_dtype is None else weight_dtype
    decision = _decide(
        *(rows, tasks, out_features, in_features, dropout_p),
        *(dtype, weight_dtype, device_type, problem is None, memory),
    )
    limit = tasks * _weight_route_from(in_features, out_features, device_type)
    needed = _weight_route_bytes(tasks, out_features, in_features, dtype, weight_dtype)
    reason = {
        "device": problem or f"there are no native kernels for {device_type} tensors",
        "dropout": "dropout on the LoRA branch has no form in weight space",
        "short": f"a merged weight rounded to {dtype} would lose the adapter",
        "memory": f"{tasks} merged weights and gradients would take {needed / 1e9:.1f} GB",
        "small": f"up to {_SMALL.get(dtype)} features a row stays in registers",
        "many rows": f"{rows} rows for {tasks} tasks are more than {limit:.0f}",
        "few rows": f"{rows} rows for {tasks} tasks are no more than {limit:.0f}",
    }[decision]
    return RouteChoice(_ROUTE_OF[decision], reason)


_ROUTE_OF = {
    "device": "reference",
    "dropout": "token",
    "short": "token",
    "memory": "token",
    "small": "weight",
    "many rows": "weight",
    "few rows": "token",
}


def _decide(
    rows: int,
    tasks: int,
    out_features: int,
    in_features: int,
    dropout_p: float,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device_type: str,
    native: bool,
    memory: int | None,
) -> str:
    """What settles the route, a key of _ROUTE_OF; quick, since every call asks."""
    if not native or device_type not in ("cpu", "cuda"):
        return "device"
    if dropout_p > 0:
        return "dropout"
    if device_type == "cpu":
        if dtype in SHORT:
            return "short"
        if max(in_features, out_features) <= _SMALL.get(dtype, 0):
            return "small"
    elif weight_dtype in SHORT:
        return "short"
    elif memory is not None and memory < _weight_route_bytes(
        tasks, out_features, in_features, dtype, weight_dtype
    ):
        return "memory"
    many = rows > tasks * _weight_route_from(in_features, out_features, device_type)
    return "many rows" if many else "few rows"


def _weight_route_from(in_features: int, out_features: int, device_type: str) -> float:
    """Rows a task from which on forming W_t costs less than a LoRA branch for every row."""
    area = in_features * out_features
    if device_type == "cpu":
        return _CPU_WEIGHT_FROM * area / max(1, in_features + out_features)
    return _CUDA_WEIGHT_FROM * math.sqrt(area)


def _weight_route_bytes(
    tasks: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> int:
    """What the W_t, in the dtype of x, and their gradients, in that of W, take on a GPU."""
    return tasks * out_features * in_features * (dtype.itemsize + weight_dtype.itemsize)


def _memory(x: Tensor) -> int | None:
    return int(gpu_memory(x.get_device()) * _MEMORY_SHARE) if x.is_cuda else None


def _problem_of_device(x: Tensor) -> str | None:
    """Why there are no native kernels for x; None if there are."""
    if usable(x):
        return None
    if transformed():
        return "transforms of torch.func and forward-mode derivatives have plain PyTorch only"
    if x.is_cuda:
        return gpu_problem(x.get_device())
    if x.is_cpu:
        return f"the native CPU library is {cpu_status}"
    return f"there are no native kernels for {x.device.type} tensors"


class _WeightRoute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        task_ptr: Tensor,
        scaling: float,
        tf32: bool,
        keep_merged: bool,
    ) -> Tensor:
        merged = None
        if keep_merged:
            merged = call("merge_lora", weight, lora_A, lora_B, scaling, x.dtype, tf32)
        ctx.save_for_backward(x, weight, lora_A, lora_B, task_ptr, merged)
        ctx.scaling, ctx.tf32 = scaling, tf32
        arguments = (x, weight, bias, lora_A, lora_B, task_ptr, scaling, merged, tf32)
        return call("lora_linear_weight", *arguments)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        needed = ctx.needs_input_grad[:5]
        *tensors, merged = ctx.saved_tensors
        arguments = (grad_y, *tensors, ctx.scaling)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            gradients = _differentiable_gradients(*arguments)
        else:
            gradients = call("lora_linear_weight_backward", *arguments, merged, ctx.tf32, *needed)
        return *where_needed(needed, gradients), *[None] * 4


class _TokenRoute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        task_ptr: Tensor,
        scaling: float,
        dropout_p: float,
        seed: Tensor | None,
    ) -> Tensor:
        arguments = (x, weight, bias, lora_A, lora_B, task_ptr, scaling, dropout_p, seed)
        y, shrunk = call("lora_linear_token", *arguments)
        ctx.save_for_backward(x, weight, lora_A, lora_B, task_ptr, shrunk, seed)
        ctx.scaling, ctx.dropout_p = scaling, dropout_p
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        needed = ctx.needs_input_grad[:5]
        x, weight, lora_A, lora_B, task_ptr, shrunk, seed = ctx.saved_tensors
        scaling, dropout_p = ctx.scaling, ctx.dropout_p
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            gradients = _differentiable_gradients(
                grad_y, x, weight, lora_A, lora_B, task_ptr, scaling, dropout_p, seed
            )
        else:
            gradients = call(
                "lora_linear_token_backward",
                *(grad_y, x, weight, lora_A, lora_B, task_ptr, shrunk),
                *(scaling, dropout_p, seed, *needed),
            )
        return *where_needed(needed, gradients), *[None] * 4


def _differentiable_gradients(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    wide = weight.dtype  # at least as wide as that of x
    exact = reference.lora_linear_backward(
        *(grad_y.to(wide), x.to(wide), weight, lora_A, lora_B),
        *(task_ptr, scaling, dropout_p, seed),
    )
    dtypes = (x.dtype, wide, grad_y.dtype, wide, wide)
    return tuple(g.to(d) for g, d in zip(exact, dtypes, strict=True))


@register("lora_linear_weight")
def _weight_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float,
    merged: Tensor | None,
    tf32: bool,
) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@register("lora_linear_token")
def _token_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty((x.shape[0], weight.shape[0]))
    # On the CPU what is kept for backward is no shorter than a float; on a GPU it is as x is.
    wide = x.is_cpu and x.dtype in SHORT
    return y, x.new_empty((x.shape[0], lora_A.shape[1]), dtype=torch.float32 if wide else x.dtype)


@register("lora_linear_weight_backward")
def _weight_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    scaling: float,
    merged: Tensor | None,
    tf32: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return _empty_gradients(x, weight, lora_A, lora_B, needed)


@register("lora_linear_token_backward")
def _token_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
    shrunk: Tensor,
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    *needed: bool,
) -> tuple[Tensor, ...]:
    return _empty_gradients(x, weight, lora_A, lora_B, needed)


def _empty_gradients(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor, ...]:
    like = (x, weight, x, lora_A, lora_B)
    shapes = (x.shape, weight.shape, weight.shape[:1], lora_A.shape, lora_B.shape)
    return tuple(
        t.new_empty(shape if need else (0,))
        for t, shape, need in zip(like, shapes, needed, strict=True)
    )


def _autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _autocast(tensor: Tensor) -> Tensor:
    if tensor.dtype not in FLOATS or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    task_ptr: Tensor,
) -> None:
    """Raises if shapes, dtypes or devices do not fit together."""
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
    short = weight.dtype == torch.float32 and x.dtype in SHORT  # as under autocast
    check_like(name, "weight", weight, "x", x, dtype=not short)
    check_like(name, "lora_A", lora_A, "weight", weight)
    check_like(name, "lora_B", lora_B, "weight", weight)
    if not task_ptr.is_cpu and task_ptr.device != x.device:
        raise ValueError(
            f"{name}: task_ptr must be on the CPU, or on the device of x, {x.device}, got "
            f"{task_ptr.device}; move it with .cpu()"
        )


def _problem(
    x: Any, weight: Any, bias: Any, lora_A: Any, lora_B: Any, task_ptr: Any
) -> Exception | None:
    """What the checks find, of x and bias as they are under autocast."""
    try:
        if isinstance(x, Tensor) and _autocasting(x.device.type):
            x, bias = _autocast(x), _autocast(bias) if isinstance(bias, Tensor) else bias
        _check(x, weight, bias, lora_A, lora_B, task_ptr)
        if task_ptr.is_cpu or not _capturing():  # a captured stream must not be waited for
            _check_values(task_ptr, x.shape[0])
    except (TypeError, ValueError) as error:
        return error
    return None


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


def _check_route(route: str, x: Tensor, dropout_p: float) -> None:
    check_choice("lora_linear", "route", route, ROUTES)
    problem = _problem_of_device(x)
    if problem is not None:
        raise RuntimeError(
            f"lora_linear: route={route!r} cannot be had: {problem}; or use route='auto'"
        )
    if route == "weight" and dropout_p > 0:
        raise ValueError(
            f"lora_linear: route='weight' cannot apply dropout_p={dropout_p}: dropout acts on "
            f"rows, not on weights; use route='token' or 'auto'"
        )
