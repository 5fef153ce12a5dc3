"""How the raw operators are called and registered: one way for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metalora._library import native_available

_raw: dict[str, Any] = {}


def raw(name: str) -> Any:
    """The raw operator ``torch.ops.metalora.<name>``, looked up once."""
    if name not in _raw:
        _raw[name] = getattr(torch.ops.metalora, name).default
    return _raw[name]


def call(name: str, *arguments: Any) -> Any:
    """Calls a raw operator from inside an autograd.Function.

    The guard passes over the autograd key, whose only work is to refuse direct calls (see
    `register`); compiled code has no such key to pass over.
    """
    if torch.compiler.is_compiling():
        return raw(name)(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return raw(name)(*arguments)


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates an operator's fake kernel; direct calls on tensors that need grad then raise."""

    def decorate(fake: Callable[..., Any]) -> Callable[..., Any]:
        if native_available():
            torch.library.register_fake(f"metalora::{name}", fake)
            torch.library.register_autograd(
                f"metalora::{name}", _no_backward, setup_context=_refuse(name)
            )
        return fake

    return decorate


def _refuse(name: str) -> Callable[..., None]:
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        raise RuntimeError(
            f"torch.ops.metalora.{name} was called on a tensor that requires grad, but has no "
            f"autograd of its own; call the public function in metalora.ops, metalora.linear or "
            "metalora.shallow"
        )

    return setup_context


def _no_backward(ctx: Any, *grads: Tensor) -> None:
    raise AssertionError("unreachable: setup_context raises first")


def where_needed(
    needed: tuple[bool, ...], gradients: tuple[Tensor | None, ...]
) -> list[Tensor | None]:
    """The gradients that autograd asked for; raw operators return empty tensors for the others."""
    return [g if n else None for n, g in zip(needed, gradients, strict=True)]
