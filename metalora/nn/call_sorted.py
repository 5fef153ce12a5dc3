"""Calling a model with its samples sorted by task, once for all of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from metalora.nn.context import current_tasks, tasks

_PLAIN = (bool, int, float, complex, str, type(None))


def call_sorted(model: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Returns ``model(*args, **kwargs)``, computed with the samples sorted by task.

    Where the samples of a batch are in no order, every adapted layer sorts its inputs by task and
    restores the order of its outputs. Here the arguments are sorted once for all layers, and what
    the model returns is brought back into the caller's order. Samples that are sorted already are
    passed on as they are.

    The caller vouches that every tensor passed or returned has the samples along its first
    dimension, and along no other, and that the model treats a sample alike wherever it stands. It
    may draw random numbers by place, as nn.Dropout does: these then fall on other samples.

    Example:
        ``with metalora.tasks(task_ids): logits = metalora.call_sorted(model, **inputs).logits``

    Args:
        model: an adapted model, or what is around it, such as DistributedDataParallel.
        args, kwargs: tensors [B, ...] or without dimensions, numbers, strings and None; dicts,
            lists and tuples of them.

    Returns:
        What the model returns, made of the same.

    Raises:
        TypeError: if samples have to be sorted but cannot be found in some value.
        ValueError: if a tensor is not [B, ...], or there is no `metalora.tasks` context around.
    """
    batch = current_tasks()
    if batch is None:
        raise ValueError(
            "call_sorted: which task does each sample belong to? Call it inside "
            "`with metalora.tasks(task_ids):`"
        )
    if batch.order is None or batch.size == 0:
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
        parts, spec = pytree.tree_flatten(value, is_leaf=lambda part: part is not value)
        one_each = isinstance(value, self.sequences) and len(parts) == self.size
        if one_each or (len(parts) == 1 and parts[0] is value):
            what = f"a {type(value).__name__}" + (f" of {self.size} elements" if one_each else "")
            raise TypeError(
                f"call_sorted: {name} must be made of tensors [B={self.size}, ...], got {what}, "
                "whose samples cannot be told; call the model itself, whose layers then sort"
            )
        return pytree.tree_unflatten([self.permuted(name, part) for part in parts], spec)
