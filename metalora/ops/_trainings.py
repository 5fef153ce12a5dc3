"""Operators that run whole trainings, many at once, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalora.ops._native import raw, usable


def run_trainings(
    name: str,
    reference: Callable[..., tuple[Tensor, ...]],
    batch: torch.Size,
    tensors: Sequence[Tensor | None],
    *numbers: float,
) -> tuple[Tensor, ...]:
    """Runs a trainer's native operator where it is built, else its reference.

    Both take the same arguments and return the same tensors, but the operator wants exactly one
    batch dimension; ``tensors``, and so the results, have the leading dimensions ``batch``.
    """
    first = tensors[0]
    assert first is not None
    if not usable(first):
        return reference(*tensors, *numbers)
    trainings = batch.numel()
    flat = [None if t is None else t.reshape((trainings, *t.shape[len(batch) :])) for t in tensors]
    return tuple(
        result.reshape((*batch, *result.shape[1:])) for result in raw(name)(*flat, *numbers)
    )


def check_converged(function: str, diverged_at: Tensor, steps: int, rates: str) -> None:
    """Raises RuntimeError if a training diverged: names it, the step, and the rates to lower."""
    if not bool(diverged_at.any()):
        return
    where = diverged_at.nonzero()
    index = where[0].tolist()
    step = int(diverged_at[tuple(index)])
    training = f"training {index} of {list(diverged_at.shape)}: " if index else ""
    others = f" ({len(where)} trainings diverged)" if len(where) > 1 else ""
    raise RuntimeError(
        f"{function}: {training}diverged, not finite at step {step} of {steps}{others}; "
        f"lower {rates}"
    )
