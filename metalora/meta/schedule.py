"""Learning-rate schedules in closed form."""

from __future__ import annotations

import math

from metalora.meta.config import TrainConfig


def learning_rate(config: TrainConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The learning rate of one optimiser step: ``config.lr`` times `schedule_factor`."""
    return config.lr * schedule_factor(config, epoch, step, steps_per_epoch)


def schedule_factor(config: TrainConfig, epoch: int, step: int, steps_per_epoch: int) -> float:
    """The factor on all learning rates for one optimiser step.

    With i the number of the epoch or step, N how many the training has of them, n = schedule_scale
    · N and w = warmup · N (or ``warmup_steps``), the factor is (i + 1) / w while i < w, and after
    that, with p = (i - w) / (n - w): 1 (constant), (1 + cos πp) / 2 (cosine) or 1 - p (linear).

    The linear one is that of transformers' ``get_linear_schedule_with_warmup`` with w and n steps,
    but that its rise is i / w, so that the first step there has rate 0 and changes nothing.

    Args:
        config: the settings.
        epoch: number of the epoch, from 0.
        step: number of the step since the beginning of training, from 0.
        steps_per_epoch: optimiser steps in an epoch.
    """
    by_epoch = config.schedule_unit == "epoch"
    now = epoch if by_epoch else step
    training = config.epochs * (1 if by_epoch else steps_per_epoch)
    length = config.schedule_scale * training
    warmup = config.warmup * training if config.warmup_steps is None else config.warmup_steps
    if now < warmup:
        return min(1.0, (now + 1) / warmup)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (now - warmup) / (length - warmup))
    if config.schedule == "linear":
        return 1 - progress
    return (1 + math.cos(math.pi * progress)) / 2
