"""Calling a model with its samples sorted by task, once for all of its layers."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metalora.nn.context import current_tasks, tasks

_PLAIN = (
    *(Number, str, bytes, type(None), Enum, slice, range),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator),
)


def call_sorted(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Returns ``model(*args, **kwargs)``, computed with the samples sorted by task.

    Where the samples of a batch are in no order, every adapted layer sorts its inputs by task and
    restores the order of its outputs. Here the arguments are sorted once for all layers, and what
    the model returns is brought back into the caller's order. Samples that are sorted already keep
    their places, but are checked alike, so that no error depends on the order of a batch. A single
    sample, and packed ones, are passed on as they are.

    The caller vouches that every tensor passed or returned has the samples along its first
    dimension, and along no other, and that the model treats a sample alike wherever it stands. It
    may draw random numbers by place, as nn.Dropout does: these then fall on other samples.

    Example:
        ``with metalora.tasks(task_ids): logits = metalora.call_sorted(model, **inputs).logits``

    Args:
        model: an adapted model, or what is around it, such as DistributedDataParallel.
        args, kwargs: tensors [B, ...] or without dimensions, numbers, strings, dtypes, devices and
            None; dicts, lists, tuples and dataclasses of them.

    Returns:
        What the model returns, made of the same. It must hold no cache of keys and values, as a
        decoder of transformers returns one: pass ``use_cache=False``.

    Raises:
        TypeError: if samples cannot be found in some value, whether they have to be sorted or not.
        ValueError: if a tensor is not [B, ...], or there is no `metalora.tasks` context around.
    """
    batch = current_tasks()
    if batch is None:
        raise ValueError(
            "call_sorted: which task does each sample belong to? Call it inside "
            "`with metalora.tasks(task_ids):`"
        )
    if batch.size < 2 or batch.packed_rows is not None:
        return model(*args, **kwargs)
    arguments = _Samples(batch.sort, batch.size, (list, tuple))
    args = tuple(arguments.permuted(f"argument {i}", value) for i, value in enumerate(args))
    kwargs = {name: arguments.permuted(repr(name), value) for name, value in kwargs.items()}
    with tasks(batch.in_task_order()):
        outputs = model(*args, **kwargs)
    return _Samples(batch.unsort, batch.size, (list,)).permuted("the output", outputs)


@dataclass(frozen=True)
class _Samples:
    """Permutes the samples of all tensors in a value.

    Attributes:
        permute: of a tensor [B, ...].
        size: B, samples.
        sequences: what is refused if it has B elements, since these may be a sample each.
    """

    permute: Callable[[Tensor], Tensor]
    size: int
    sequences: tuple[type, ...]

    def permuted(self, name: str, value: Any) -> Any:
        """The same with its samples permuted; errors call it ``name``."""
        if isinstance(value, Tensor):
            if value.dim() == 0:
                return value
            if value.shape[0] != self.size:
                raise ValueError(
                    f"call_sorted: {name} must have its samples first, [B={self.size}, ...], got "
                    f"{list(value.shape)}; expand what all samples share, or call the model itself"
                )
            return self.permute(value)
        if isinstance(value, _PLAIN):
            return value
        if is_dataclass(value) and not isinstance(value, (type, dict)):
            return self._permuted_fields(name, value)
        parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        one_each = isinstance(value, self.sequences) and len(parts) == self.size
        if one_each or (len(parts) == 1 and parts[0] is value):
            what = f"a {type(value).__name__}" + (f" of {self.size} elements" if one_each else "")
            hint = ""
            if what.endswith("Cache"):
                hint = (
                    "pass use_cache=False (a cache of keys and values serves generation only), or "
                )
            raise TypeError(
                f"call_sorted: {name} must be made of tensors [B={self.size}, ...], got {what}, "
                f"whose samples cannot be told; {hint}call the model itself, whose layers then sort"
            )
        return pytree.tree_unflatten([self.permuted(name, part) for part in parts], spec)

    def _permuted_fields(self, name: str, value: Any) -> Any:
        """The same with the fields of a dataclass; what else it holds is kept."""
        found = copy(value)
        for field in fields(value):
            part = self.permuted(f"{name}.{field.name}", getattr(value, field.name))
            object.__setattr__(found, field.name, part)  # it may be frozen
        return found
