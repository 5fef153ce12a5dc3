"""Checks of tensors that the functions of the linear model and the shallow network share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)


def check_tensor(function: str, argument: str, value: Any) -> Tensor:
    """Returns ``value`` if it is a float32 or float64 tensor that needs no gradient."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}: {argument} must be a torch.Tensor, got {type(value).__name__}"
        )
    if value.dtype not in DTYPES:
        raise TypeError(
            f"{function}: {argument} must be float32 or float64, got {value.dtype}; "
            "convert it with .double()"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {argument} requires grad, but nothing here is differentiable; "
            "pass it with .detach()"
        )
    return value


def check_like(function: str, argument: str, value: Any, like: Tensor, name: str) -> Tensor:
    """Returns ``value`` if it is a tensor of ``like``'s dtype and device."""
    check_tensor(function, argument, value)
    if value.dtype != like.dtype:
        raise TypeError(
            f"{function}: {argument} must be {like.dtype} as {name} is, got {value.dtype}"
        )
    if value.device != like.device:
        raise ValueError(
            f"{function}: {argument} must be on {like.device} as {name} is, got {value.device}"
        )
    return value


def check_shape(function: str, argument: str, value: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns ``value`` if it has exactly this shape."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{function}: {argument} must be {list(shape)}, got {list(value.shape)}")
    return value


def check_finite(function: str, argument: str, value: Tensor) -> Tensor:
    """Returns ``value`` if it holds neither NaN nor infinity."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{function}: {argument} must be finite, got NaN or infinite entries")
    return value


def check_generator(function: str, generator: Any) -> None:
    """Refuses what is neither None nor a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{function}: generator must be a torch.Generator or None, "
            f"got {type(generator).__name__}"
        )


def randn(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Standard normal values, drawn in float64: one seed gives the same values in every dtype."""
    source = generator.device if generator is not None else device
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=source).to(
        device, dtype
    )
