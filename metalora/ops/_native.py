"""How the raw operators are called and registered: one way for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metalora._checks import FLOATS, SHORT
from metalora._library import REINSTALL, constant_when_compiled, gpu_problem, native_available
from metalora._transforms import transformed
from metalora._warn import warn_user

operators: list[str] = []  # the names of all that `register` has seen, native or not
_raw: dict[str, Any] = {}
_warned: set[str] = set()


def usable(tensor: Tensor) -> bool:
    """Whether native kernels take tensors of this device; says once why a GPU goes without."""
    if transformed():
        return False
    if tensor.is_cpu:
        return native_available()
    if not tensor.is_cuda:
        return False
    problem = gpu_problem(tensor.get_device())
    if problem is not None and problem not in _warned:
        _warned.add(problem)
        warn_user(f"CUDA tensors run on plain PyTorch: {problem}")
    return problem is None


def autocasting(device_type: str) -> bool:
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Within, operators compute in the dtype of their inputs."""
    return torch.autocast(device_type, enabled=False) if autocasting(device_type) else nullcontext()


def autocast(tensor: Tensor) -> Tensor:
    """The tensor as torch.autocast wants it, which is on for its device."""
    if tensor.dtype not in FLOATS or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(tensor.device.type))


@constant_when_compiled
def tf32_allowed(dtype: torch.dtype, on_gpu: bool) -> bool:
    """Whether products of this dtype may round their factors to TF32, as GPUs can.

    They may where the products around them are no more precise: in 16 bits, and in float32 where
    torch is set to TF32. That setting is slow to read, so it is read for GPUs only.
    """
    if dtype == torch.float32:
        return on_gpu and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return dtype in SHORT


def raw(name: str) -> Any:
    """The raw operator ``torch.ops.metalora.<name>``, which `register` has looked up."""
    return _raw[name]


def call(name: str, *arguments: Any) -> Any:
    """Calls a raw operator from inside an autograd.Function.

    The guard passes over the autograd key, whose only work is to refuse direct calls (see
    `register`); compiled code has no such key to pass over.
    """
    if torch.compiler.is_compiling():
        return raw(name)(*arguments)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return raw(name)(*arguments)
    except RuntimeError as error:
        if "CUDA out of memory" in str(error):  # its type does not pass the stable interface
            raise torch.OutOfMemoryError(str(error)) from None
        raise


def _fake_kernel(name: str, fake: Callable[[Any], Any]) -> Callable[..., Any]:
    """The fake kernel with the operator's own signature, refusing tensors of several devices.

    With one meta tensor among real ones, the dispatcher takes the fake kernel, whose result would
    be memory that nobody wrote. Only task_ptr may be on the CPU beside tensors of another device.
    """
    names = [argument.name for argument in raw(name)._schema.arguments]

    def checked(*arguments: Any, **named: Any) -> Any:
        given = {**dict(zip(names, arguments, strict=False)), **named}
        devices = {n: given[n].device for n in names if isinstance(given[n], Tensor)}
        first = next(iter(devices))
        for other, device in devices.items():
            is_pointers = other == "task_ptr" and device.type == "cpu"
            if device != devices[first] and not is_pointers:
                raise RuntimeError(
                    f"torch.ops.metalora.{name}: {other} must be on the device of {first}, "
                    f"{devices[first]}, got {device}"
                )
        return fake(SimpleNamespace(**given))

    return checked


def _looked_up(name: str) -> Any:
    operator = getattr(torch.ops.metalora, name, None)
    if operator is None:
        raise ImportError(
            f"metalora: the native CPU library has no operator {name!r}, since it was built from "
            f"other sources; build it again: {REINSTALL.format('auto')}"
        )
    return operator.default


def register(*names: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """Decorates the fake kernel of operators, which takes the arguments as one namespace.

    Direct calls of these operators on tensors that need grad then raise.
    """

    def decorate(fake: Callable[[Any], Any]) -> Callable[[Any], Any]:
        for name in names:
            operators.append(name)
            if native_available():
                qualified = f"metalora::{name}"
                _raw[name] = _looked_up(name)
                torch.library.register_fake(qualified, _fake_kernel(name, fake))
                torch.library.register_autograd(
                    qualified, _no_backward, setup_context=_refuse(name)
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
    needed: tuple[bool, ...], gradients: Sequence[Tensor | None]
) -> Sequence[Tensor | None]:
    """The gradients that autograd asked for, of all that a raw operator returns."""
    if all(needed):
        return gradients
    return [g if n else None for n, g in zip(needed, gradients, strict=True)]
