"""Layers that read the same input one after the other, as those of queries, keys and values do.

On a GPU such an input would be cast by each of them under autocast, and autograd would add up their
gradients in passes of its own. Here each layer hands on its rows to the next one that is called
with the very same tensor: it is cast once, and gradients come back through the layers, which add
theirs; see `metalora.ops.lora_linear.lora_linear_handing_on`. Every layer still computes its own
output when it is called, so whatever happens between the calls, a layer that is given another
tensor, or one that was written to, starts anew.

What is handed on is kept by the ``with metalora.tasks(...)`` block around, and so by one thread or
coroutine; it goes when the block is left.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metalora._transforms import transformed
from metalora.nn.context import current_scope
from metalora.nn.task_batch import TaskBatch

# On a CPU a step is no faster by it, and its results would change in the last bits.
SHARING_DEVICES = ["cuda"]


class _HandedOn(NamedTuple):
    x: Tensor  # what the layers were called with
    circumstances: tuple[Any, ...]  # when they were
    rows: Tensor  # of x, for the next layer
    readers: tuple[nn.Module, ...]


def may_share(x: Tensor, batch: TaskBatch | None) -> bool:
    """Whether x may be handed on: its samples are in task order, and it gets a gradient.

    Subclasses of Tensor, such as fake or distributed ones, are not.
    """
    if x.device.type not in SHARING_DEVICES or type(x) is not Tensor:
        return False
    if torch.compiler.is_compiling():
        return False
    if batch is None or batch.order is not None or batch.size == 0:
        return False
    return x.requires_grad and torch.is_grad_enabled() and not transformed()


def rows_handed_on(layer: nn.Module, x: Tensor, rows: Tensor) -> Tensor:
    """The rows that another layer called with x has handed on, or else ``rows``."""
    kept = _kept(layer, x)
    return rows if kept is None else kept.rows


def hand_on(layer: nn.Module, x: Tensor, rows: Tensor) -> None:
    """Keeps ``rows`` of x for the next layer."""
    scope, kept = current_scope(), _kept(layer, x)
    if scope is not None:
        readers = (layer,) if kept is None else (*kept.readers, layer)
        scope.shared = _HandedOn(x, _circumstances(x), rows, readers)


def _kept(layer: nn.Module, x: Tensor) -> _HandedOn | None:
    """What was handed on of x as it is now; a layer that is called again begins another pass."""
    scope = current_scope()
    kept: _HandedOn | None = None if scope is None else scope.shared
    if kept is None or kept.x is not x or layer in kept.readers:
        return None
    return kept if kept.circumstances == _circumstances(x) else None


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """What must be as it was: x, to which nobody wrote, autocast, the GPU's stream and graph."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    if not x.is_cuda:
        return x._version, dtype
    stream = torch.cuda.current_stream(x.device)
    return x._version, dtype, stream, torch.cuda.is_current_stream_capturing()
