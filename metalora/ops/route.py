"""Which route `lora_linear` takes, and why."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metalora._checks import SHORT, check_choice, check_float
from metalora._library import cpu_status, gpu_memory, gpu_problem
from metalora._transforms import transformed
from metalora.ops._native import autocast, autocasting, usable

ROUTES = ("auto", "weight", "token", "reference")

# The weight route wins once a task has more rows than, on a CPU, this many times
# in * out / (in + out), where the two were measured to cross (`python -m benchmarks.lora_linear
# --cases routes --baselines routes`); on a GPU, this many times sqrt(in * out), where their
# memory traffic is equal.
_CPU_WEIGHT_FROM = 2.5
_CUDA_WEIGHT_FROM = 2.0
# Up to so many features a row stays in registers (kSmall of csrc/cpu/kernels/kernels.h). There the
# routes were measured to cross at this part of (in * out)^0.75 rows a task, with rank 4 (``--cases
# small``).
_SMALL = {torch.float32: 64, torch.float64: 32}
_SMALL_WEIGHT_FROM = {torch.float32: 1 / 9, torch.float64: 1 / 10}
# The weight route calls fewer kernels, and so is ahead by what so many rows cost.
_SMALL_ROWS_AHEAD = 400
# Of a GPU's memory the weight route takes at most this part for the W_t and their gradients.
_MEMORY_SHARE = 1 / 8


class RouteChoice(NamedTuple):
    """The route that `lora_linear` takes, and why.

    Attributes:
        route: "weight", "token" or "reference".
        reason: a phrase that says why.
    """

    route: str
    reason: str


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
    if autocasting(x.device.type):
        x = autocast(x)
    return choose_route(
        rows=x.shape[0],
        tasks=lora_A.shape[0],
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        dropout_p=dropout_p,
        dtype=x.dtype,
        weight_dtype=weight.dtype,
        device_type=x.device.type,
        problem=_problem_of_device(x),
        memory=memory_of(x),
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
    """The choice behind route="auto": a pure function of its arguments.

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
    decision = decide(
        *(rows, tasks, out_features, in_features, dropout_p),
        *(dtype, weight_dtype, device_type, problem is None, memory),
    )
    limit = _weight_route_from(tasks, out_features, in_features, dtype, weight_dtype, device_type)
    needed = _weight_route_bytes(tasks, out_features, in_features, dtype, weight_dtype)
    reason = {
        "device": problem or f"there are no native kernels for {device_type} tensors",
        "dropout": "dropout on the LoRA branch has no form in weight space",
        "short": f"a merged weight rounded to {dtype} would lose the adapter",
        "memory": f"{tasks} merged weights and gradients would take {needed / 1e9:.1f} GB",
        "many rows": f"{rows} rows for {tasks} tasks are more than {limit:.0f}",
        "few rows": f"{rows} rows for {tasks} tasks are no more than {limit:.0f}",
    }[decision]
    return RouteChoice(ROUTE_OF[decision], reason)


ROUTE_OF = {
    "device": "reference",
    "dropout": "token",
    "short": "token",
    "memory": "token",
    "many rows": "weight",
    "few rows": "token",
}


def decide(
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
    """The reason that settles the route, a key of ROUTE_OF; quick, since every call needs it."""
    if not native or device_type not in ("cpu", "cuda"):
        return "device"
    if dropout_p > 0:
        return "dropout"
    if weight_dtype in SHORT:
        return "short"
    if (
        device_type != "cpu"
        and memory is not None
        and memory < _weight_route_bytes(tasks, out_features, in_features, dtype, weight_dtype)
    ):
        return "memory"
    limit = _weight_route_from(tasks, out_features, in_features, dtype, weight_dtype, device_type)
    return "many rows" if rows > limit else "few rows"


def takes_small_kernels(x: Tensor, weight: Tensor, task_ptr: Tensor) -> bool:
    """Whether the layer is small on a CPU, and `decide` says "many rows" without dropout.

    It is asked first: a layer that small takes little longer than the Python around it.
    """
    (out_features, in_features), dtype = weight.shape, x.dtype
    if not _is_small(out_features, in_features, dtype, weight.dtype, x.device.type):
        return False
    if not task_ptr.is_cpu or torch.is_autocast_enabled("cpu"):
        return False
    tasks = task_ptr.shape[0] - 1
    return x.shape[0] > _small_weight_route_from(tasks, out_features, in_features, dtype)


def rows_each(x: Tensor, weight: Tensor, task_ptr: Tensor) -> int:
    """The rows of each task if a symmetric layer is one for `task_matvec`, else 0.

    That is, on a GPU, small, with equally many rows for each task, and in full precision: it is
    then one kernel, where the weight route takes several.
    """
    small = x.is_cuda and max(weight.shape) <= _SMALL.get(torch.float32, 0)
    if not small or _SMALL.get(x.dtype, 0) == 0 or weight.dtype != x.dtype or not task_ptr.is_cpu:
        return 0
    if autocasting(x.device.type) or torch.compiler.is_compiling() or not usable(x):
        return 0
    tasks, total = task_ptr.shape[0] - 1, x.shape[0]
    rows = total // max(tasks, 1)
    equal = rows > 0 and task_ptr.tolist() == [t * rows for t in range(tasks + 1)]
    return rows if equal and rows * tasks == total else 0


def _is_small(
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device_type: str,
) -> bool:
    """Whether a CPU has kernels of its own for a layer of that size."""
    if dtype not in _SMALL or weight_dtype != dtype or device_type != "cpu":
        return False
    return in_features <= _SMALL[dtype] and out_features <= _SMALL[dtype]


def _weight_route_from(
    tasks: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device_type: str,
) -> float:
    """Rows from which on forming every W_t costs less than a LoRA branch for every row."""
    if _is_small(out_features, in_features, dtype, weight_dtype, device_type):
        return _small_weight_route_from(tasks, out_features, in_features, dtype)
    area = in_features * out_features
    if device_type == "cpu":
        return tasks * _CPU_WEIGHT_FROM * area / max(1, in_features + out_features)
    return tasks * _CUDA_WEIGHT_FROM * math.sqrt(area)


def _small_weight_route_from(
    tasks: int, out_features: int, in_features: int, dtype: torch.dtype
) -> float:
    """The same for layers that are small, see `_is_small`."""
    area = in_features * out_features
    return max(tasks * _SMALL_WEIGHT_FROM[dtype] * area**0.75 - _SMALL_ROWS_AHEAD, 0.0)


def _weight_route_bytes(
    tasks: int,
    out_features: int,
    in_features: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> int:
    """What the W_t, in the dtype of x, and their gradients, in that of W, take on a GPU."""
    return tasks * out_features * in_features * (dtype.itemsize + weight_dtype.itemsize)


def keeps_merged(rows: int, tasks: int, out_features: int) -> bool:
    """Whether a GPU keeps all W_t [T, out, in] for backward because they are small.

    They take at most an eighth of x [M, in] then, which is kept anyway.
    """
    return 8 * tasks * out_features <= rows


def memory_of(x: Tensor) -> int | None:
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


def check_route(route: str, x: Tensor, dropout_p: float) -> None:
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
