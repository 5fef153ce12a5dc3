"""Retraining and fine-tuning of all trials by the native trainers, on sufficient statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.synthetic.linear.draws import Trial
from experiments.synthetic.linear.settings import LinearSettings
from metalora.linear import SufficientStatistics, finetune_lora, lora_ml, standard


def retrained(method: str, drawn: Sequence[Trial], settings: LinearSettings) -> Tensor:
    """Returns the shared weights that a method leaves, [trials, d, d]."""
    device = torch.device(settings.device)
    stats = SufficientStatistics.stack([t.retrain_stats for t in drawn]).to(device)
    if method == "standard":
        return standard(stats, steps=settings.outer_steps, lr=settings.outer_lr).weight
    return lora_ml(
        stats,
        drawn[0].point.rank,
        outer_steps=settings.outer_steps,
        inner_steps=settings.inner_steps,
        outer_lr=settings.outer_lr,
        inner_lr=settings.inner_lr,
        initial_factors=torch.stack([t.adapters for t in drawn]).to(device),
    ).weight


def errors_of_finetuning(
    weights: Tensor, drawn: Sequence[Trial], settings: LinearSettings
) -> Tensor:
    """Returns the prediction errors before and after every step, [trials, steps + 1]."""
    device, point = torch.device(settings.device), drawn[0].point
    result = finetune_lora(
        SufficientStatistics.stack([t.test_stats for t in drawn]).to(device),
        weights,
        point.finetune_rank,
        steps=point.finetune_steps,
        lr=settings.finetune_lr,
        initial_factors=(
            torch.stack([t.factor_u for t in drawn]).to(device),
            torch.stack([t.factor_v for t in drawn]).to(device),
        ),
        truth=torch.stack([t.test_truth for t in drawn]).to(device),
    )
    assert result.errors is not None
    return result.errors.cpu()
