"""What is wrong with a call's tensors, in one line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_LARGEST = sys.float_info.max
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHORT = (torch.bfloat16, torch.float16)


def check_float(function: str, argument: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {argument} must be floating point (float32, float64, bfloat16 or "
            f"float16), got {tensor.dtype}; convert it with .float()"
        )
    if tensor.layout != torch.strided:
        raise TypeError(
            f"{function}: {argument} must be a dense tensor, got layout {tensor.layout}; convert "
            "it with .to_dense()"
        )


def check_like(
    function: str, argument: str, tensor: Tensor, like: str, other: Tensor, dtype: bool = True
) -> None:
    """The tensor must be on the device, and by default of the dtype, of another argument."""
    check_float(function, argument, tensor)
    if tensor.device != other.device:
        raise ValueError(
            f"{function}: {argument} must be on the device of {like}, {other.device}, got "
            f"{tensor.device}; move it with .to({str(other.device)!r})"
        )
    if dtype and tensor.dtype != other.dtype:
        raise TypeError(
            f"{function}: {argument} must have the dtype of {like}, {other.dtype}, got "
            f"{tensor.dtype}; convert one of them with .to()"
        )


def check_shape(
    function: str, argument: str, tensor: Tensor, names: Sequence[str], sizes: Sequence[int | None]
) -> None:
    """It must be a tensor of these sizes, of which None may be anything."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(tensor).__name__}")
    shape = tuple(tensor.shape)
    if len(shape) == len(sizes) and all(w in (None, g) for w, g in zip(sizes, shape, strict=True)):
        return
    wanted = ", ".join(
        name if size is None or name == str(size) else f"{name}={size}"
        for name, size in zip(names, sizes, strict=True)
    )
    hint = ""
    if len(shape) == len(sizes) >= 2:
        swapped = (*shape[:-2], shape[-1], shape[-2])
        if all(w in (None, g) for w, g in zip(sizes, swapped, strict=True)):
            hint = "; is it transposed?"
    raise ValueError(f"{function}: {argument} must be [{wanted}], got {list(shape)}{hint}")


def check_rank(function: str, argument: str, tensor: Tensor, rank: int) -> None:
    """The rank, one of the sizes of ``tensor``, must not be zero."""
    if rank == 0:
        raise ValueError(
            f"{function}: {argument} must have a rank of at least 1, got {list(tensor.shape)}"
        )


def check_scaling(function: str, scaling: Any) -> float:
    """The scaling as a float; it must be a finite number."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{function}: scaling must be a number, got {type(scaling).__name__}")
    if not -_LARGEST <= scaling <= _LARGEST:  # math.isfinite breaks a graph under torch.compile
        raise ValueError(f"{function}: scaling must be finite, got {scaling}")
    return float(scaling)
