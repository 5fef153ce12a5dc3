"""The shallow network's trainers as operators, and their references."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from metalora.ops._native import register
from metalora.ops._trainings import run_trainings
from metalora.reference import shallow as reference

_REFERENCE: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "shallow_retrain": reference.retrain,
    "shallow_finetune": reference.finetune,
}


def train(
    name: str, batch: torch.Size, tensors: Sequence[Tensor | None], *numbers: float
) -> tuple[Tensor, ...]:
    """Runs a trainer on tensors with leading dimensions ``batch``; so are the results."""
    return run_trainings(name, _REFERENCE[name], batch, tensors, *numbers)


@register("shallow_retrain")
def _retrain_fake(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    output: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    epochs: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    trainings, tasks, _, dim = x.shape
    rank = 0 if lora_A is None else lora_A.shape[2]
    return (
        torch.empty_like(weight),
        torch.empty_like(output),
        x.new_empty(trainings, tasks, rank, dim),
        x.new_empty(trainings, tasks, dim, rank),
        *_records(x, epochs),
    )


@register("shallow_finetune")
def _finetune_fake(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    output: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    epochs: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, ...]:
    return torch.empty_like(lora_A), torch.empty_like(lora_B), *_records(x, epochs)


def _records(x: Tensor, epochs: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], epochs), x.new_empty(x.shape[0], dtype=torch.int64)
