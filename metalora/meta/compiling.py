"""Trainings whose model `torch.compile` compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor, nn
from torch.fx.experimental import _config as shapes

from metalora._checks import first_line

# Models of other sizes and other adapters are compiled apart, in a process that trains many. Beyond
# torch's own limit of 8 it would go on without compiling, and only warn.
_RECOMPILE_LIMIT = 256


@contextmanager
def compiled(model: nn.Module) -> Iterator[None]:
    """Within, calls of ``model`` run compiled; its parameters and modules keep their names.

    Sizes are compiled as variables, also those that are equal, or 1, in the first batch, so that
    batches of other sizes need no new compilation. A model that is compiled in place already, by
    ``model.compile()``, stays as it is.

    Raises:
        ValueError: if ``model`` is wrapped by ``torch.compile``.
        RuntimeError: if nothing can be compiled here, as without a C++ compiler.
    """
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise ValueError(
            "train: compile=True takes a plain model and compiles it in place, got one wrapped by "
            "torch.compile(model); pass the model itself"
        )
    if model._compiled_call_impl is not None:
        yield
        return
    _check_compiler(next(model.parameters()).device.type)
    model.compile(dynamic=True)
    try:
        with (
            torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT),
            shapes.patch(use_duck_shape=False, backed_size_oblivious=True),  # type: ignore[attr-defined]
        ):
            yield
    finally:
        model._compiled_call_impl = None


@cache
def _check_compiler(device_type: str) -> None:
    """Raises RuntimeError unless a function of one line can be compiled for this device."""
    try:
        with torch.no_grad():
            torch.compile(_twice)(torch.ones(2, device=device_type))
    except Exception as error:
        needed = "triton" if device_type == "cuda" else "a C++ compiler, such as g++ (or set CXX)"
        raise RuntimeError(
            f"train: compile=True needs what torch.compile needs, but it fails here: "
            f"{first_line(error)}; install {needed}, or set compile=False"
        ) from error


def _twice(x: Tensor) -> Tensor:
    return x + x
