"""Operators that run whole trainings, many at once, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from metalora._errors import DivergedError
from metalora.ops._native import raw, register, usable
from metalora.reference import linear, shallow

_REFERENCE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "linear_lora_ml": linear.lora_ml,
    "linear_standard": linear.standard,
    "linear_finetune_lora": linear.finetune_lora,
    "shallow_retrain": shallow.retrain,
    "shallow_finetune_lora": shallow.finetune_lora,
}


def train(
    name: str, batch: torch.Size, tensors: Sequence[Tensor | None], *numbers: float
) -> tuple[Tensor, ...]:
    """Runs a trainer's native operator where it is built, else its reference.

    Both take the same arguments and return the same tensors, but the operator wants exactly one
    batch dimension; ``tensors``, and so the results, have the leading dimensions ``batch``.
    """
    first = tensors[0]
    assert first is not None
    if not usable(first):
        return _REFERENCE[name](*tensors, *numbers)
    trainings = batch.numel()
    flat = [None if t is None else t.reshape((trainings, *t.shape[len(batch) :])) for t in tensors]
    return tuple(
        result.reshape((*batch, *result.shape[1:])) for result in raw(name)(*flat, *numbers)
    )


def check_converged(function: str, diverged_at: Tensor, steps: int, rates: str) -> None:
    """Raises DivergedError if a training diverged: names it, the step, and the rates to lower."""
    if not bool(diverged_at.any()):
        return
    where = diverged_at.nonzero()
    index = where[0].tolist()
    step = int(diverged_at[tuple(index)])
    training = f"training {index} of {list(diverged_at.shape)}: " if index else ""
    others = f" ({len(where)} trainings diverged)" if len(where) > 1 else ""
    raise DivergedError(
        f"{function}: {training}diverged, not finite at step {step} of {steps}{others}; "
        f"lower {rates}"
    )


@register("linear_lora_ml")
def _lora_ml_fake(a: Any) -> tuple[Tensor, ...]:
    records = _records(a.gram, a.outer_steps)
    return _contiguous(a.weight), _contiguous(a.factors), *records


@register("linear_standard")
def _standard_fake(a: Any) -> tuple[Tensor, ...]:
    return _contiguous(a.weight), *_records(a.gram, a.steps)


@register("linear_finetune_lora")
def _linear_finetune_fake(a: Any) -> tuple[Tensor, ...]:
    losses, diverged_at = _records(a.gram, a.steps)
    errors = a.gram.new_empty((a.gram.shape[0], 0 if a.truth is None else a.steps + 1))
    return _contiguous(a.factor_u), _contiguous(a.factor_v), losses, errors, diverged_at


@register("shallow_retrain")
def _retrain_fake(a: Any) -> tuple[Tensor, ...]:
    trainings, tasks, _, dim = a.x.shape
    rank = 0 if a.lora_A is None else a.lora_A.shape[2]
    return (
        *(_contiguous(a.weight), _contiguous(a.output)),
        *(a.x.new_empty(trainings, tasks, rank, dim), a.x.new_empty(trainings, tasks, dim, rank)),
        *_records(a.x, a.epochs),
    )


@register("shallow_finetune_lora")
def _shallow_finetune_fake(a: Any) -> tuple[Tensor, ...]:
    return _contiguous(a.lora_A), _contiguous(a.lora_B), *_records(a.x, a.epochs)


def _contiguous(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _records(like: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The losses of every training, and the steps at which they diverged."""
    trainings = like.shape[0]
    return like.new_empty((trainings, steps)), like.new_empty(trainings, dtype=torch.int64)
