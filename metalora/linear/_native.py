"""The linear trainers' operators and their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalora.ops._native import register
from metalora.ops._trainings import run_trainings
from metalora.reference import linear as reference

_REFERENCE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "linear_retrain_lora_ml": reference.retrain_lora_ml,
    "linear_retrain_standard": reference.retrain_standard,
    "linear_finetune_lora": reference.finetune_lora,
}


def train(
    name: str, batch: torch.Size, tensors: Sequence[Tensor | None], *numbers: float
) -> tuple[Tensor, ...]:
    """Runs a trainer on tensors with leading dimensions ``batch``; so are the results."""
    return run_trainings(name, _REFERENCE[name], batch, tensors, *numbers)


@register("linear_retrain_lora_ml")
def _lora_ml_fake(
    gram: Tensor,
    cross: Tensor,
    energy: Tensor,
    weight: Tensor,
    factors: Tensor,
    count: int,
    outer_steps: int,
    inner_steps: int,
    outer_lr: float,
    inner_lr: float,
) -> tuple[Tensor, ...]:
    return torch.empty_like(weight), torch.empty_like(factors), *_records(gram, outer_steps)


@register("linear_retrain_standard")
def _standard_fake(
    gram: Tensor,
    cross: Tensor,
    energy: Tensor,
    weight: Tensor,
    count: int,
    steps: int,
    lr: float,
) -> tuple[Tensor, ...]:
    return torch.empty_like(weight), *_records(gram, steps)


@register("linear_finetune_lora")
def _finetune_fake(
    gram: Tensor,
    cross: Tensor,
    energy: Tensor,
    weight: Tensor,
    factor_u: Tensor,
    factor_v: Tensor,
    truth: Tensor | None,
    count: int,
    steps: int,
    lr: float,
) -> tuple[Tensor, ...]:
    losses, diverged_at = _records(gram, steps)
    errors = gram.new_empty((gram.shape[0], 0 if truth is None else steps + 1))
    return torch.empty_like(factor_u), torch.empty_like(factor_v), losses, errors, diverged_at


def _records(gram: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    trainings = gram.shape[0]
    return gram.new_empty((trainings, steps)), gram.new_empty(trainings, dtype=torch.int64)
