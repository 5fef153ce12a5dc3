"""The ways to retrain a model, and to fine-tune it afterwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    as_lora_config,
    freeze_base,
    reset_adapters,
    task_state_dict,
    unload,
)
from metalora.meta.callbacks import Callback
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds
from metalora.meta.loop import Result, Validation, train
from metalora.meta.restore import as_before_on_error
from metalora.meta.seeds import derive_seed, own_random_state
from metalora.meta.steps import (
    Forward,
    GradientStep,
    Loss,
    ReptileStep,
    call_model,
    cross_entropy,
)


def standard(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    *,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Standard retraining (paper, eq. 1): one set of weights for all tasks, and no adapters.

    Args:
        model: a plain model, trained in place.
        rounds: the retraining tasks; pooled, the loss is the mean over a batch's samples.
        config: settings.
        loss: ``loss(outputs, batch)`` → the loss of each sample, [B].
        forward: ``forward(model, batch.inputs)`` → outputs.
        validation: a loader, of which the accuracy is taken, or a function of the model.
        callbacks: see `Callback`; `KeepBest` decides which epoch's weights stay.

    Raises:
        ValueError: if ``model`` has adapters.
        DivergedError: if the loss is not finite, see `train`.
    """
    _check_plain("standard", model)
    step = GradientStep(model, rounds, config, loss=loss, forward=forward)
    return train(
        model, rounds, step, config, validation=validation, callbacks=callbacks, forward=forward
    )


@own_random_state()
def lora_ml(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    adapter: Any,
    *,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """LoRA-ML (paper, eq. 6): the shared weights are trained together with LoRA for every task.

    Args:
        model: a plain model. Trained in place, and plain again afterwards, also after an error: it
            keeps the shared weights, while the adapters are in the result.
        rounds: the retraining tasks.
        config: settings.
        adapter: a `LoRAConfig` (also with symmetric adapters, or heads) or a ``peft.LoraConfig``.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`; each sample runs with its own task's adapters.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters already, or ``adapter`` does not fit it.
        DivergedError: if the loss is not finite, see `train`.
    """
    _check_plain("lora_ml", model)
    named = model.named_parameters(remove_duplicate=False)
    trainable = {name: parameter.requires_grad for name, parameter in named}
    torch.manual_seed(derive_seed("adapters", config.seed))
    try:
        adapt(model, adapter, rounds.num_tasks)
        step = GradientStep(model, rounds, config, loss=loss, forward=forward)
        result = train(
            model, rounds, step, config, validation=validation, callbacks=callbacks, forward=forward
        )
        return _with_adapters(result, model, rounds)
    finally:
        if adapted_layers(model):
            unload(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(trainable[name])


def last_layer_ml(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str] = ("head",),
    *,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Last-Layer-ML: the shared weights are trained together with a last layer for every task.

    Args:
        model: a plain model. Trained in place, and plain again afterwards, its head the mean of
            the tasks' heads, which are in the result.
        rounds: the retraining tasks.
        config: settings.
        heads: names of the layers that exist once per task.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`; each sample runs with its own task's head.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters already, or ``heads`` are not in it.
        DivergedError: if the loss is not finite, see `train`.
    """
    return lora_ml(
        model,
        rounds,
        config,
        _heads_only("last_layer_ml", heads),
        loss=loss,
        forward=forward,
        validation=validation,
        callbacks=callbacks,
    )


def reptile(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    *,
    inner_steps: int = 20,
    inner_lr: float = 1e-2,
    inner_optimizer: str = "sgd",
    outer_sign: str = "towards",
    average: bool = False,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Reptile: W moves towards where some optimiser steps on one task would take it.

    Args:
        model: a plain model, trained in place.
        rounds: the retraining tasks; ``inner_steps`` rounds make the inner steps of each task.
        config: settings of the outer optimiser; ``step_per`` is not used, ``grad_clip`` and
            ``precision`` hold for the inner steps.
        inner_steps: inner steps per task.
        inner_lr: learning rate of the inner optimiser, which starts anew each time.
        inner_optimizer: "sgd", "adam" or "adamw".
        outer_sign: "towards" hands W − W_inner to the outer optimiser as the gradient; "away" the
            opposite.
        average: one outer step for the mean over tasks, instead of one per task.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters, or a setting is outside its range.
        DivergedError: if the loss is not finite, see `train`.
    """
    _check_plain("reptile", model)
    step = ReptileStep(
        model,
        rounds,
        config,
        inner_steps=inner_steps,
        inner_lr=inner_lr,
        inner_optimizer=inner_optimizer,
        outer_sign=outer_sign,
        average=average,
        loss=loss,
        forward=forward,
    )
    return train(
        model, rounds, step, config, validation=validation, callbacks=callbacks, forward=forward
    )


@own_random_state()
def finetune_lora(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    adapter: Any,
    *,
    fresh_heads: bool = False,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Fine-tuning with LoRA (paper, eq. 2-4): all weights frozen, a new adapter per task.

    Several tasks are fine-tuned side by side. Their mean loss gives each 1/T of the gradient it
    would have alone: nothing to Adam, but ``grad_clip`` clips them together.

    Args:
        model: a plain model; it is left adapted and frozen; after an error it is as it was.
            `metalora.merge_and_unload` takes one task's adapters into the weights.
        rounds: the tasks to fine-tune for.
        config: settings.
        adapter: a `LoRAConfig` or a ``peft.LoraConfig``; its heads are trained too.
        fresh_heads: whether the heads start anew, instead of from the model's.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters already, or ``adapter`` does not fit it.
        DivergedError: if the loss is not finite, see `train`.
    """
    _check_plain("finetune_lora", model)
    with as_before_on_error(model):
        torch.manual_seed(derive_seed("adapters", config.seed))
        adapt(model, as_lora_config(adapter), rounds.num_tasks)
        freeze_base(model)
        if fresh_heads:
            reset_adapters(model)
        step = GradientStep(model, rounds, config, loss=loss, forward=forward)
        result = train(
            model, rounds, step, config, validation=validation, callbacks=callbacks, forward=forward
        )
        return _with_adapters(result, model, rounds)


def finetune_last_layer(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str] = ("head",),
    *,
    fresh: bool = True,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Fine-tuning of the last layer: all else frozen, a new head per task.

    Args:
        model: a plain model; it is left with a head per task, and frozen; after an error it is as
            it was.
        rounds: the tasks to fine-tune for.
        config: settings.
        heads: names of the layers to train.
        fresh: whether the heads start anew, instead of from the model's.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters already, or ``heads`` are not in it.
        DivergedError: if the loss is not finite, see `train`.
    """
    return finetune_lora(
        model,
        rounds,
        config,
        _heads_only("finetune_last_layer", heads),
        fresh_heads=fresh,
        loss=loss,
        forward=forward,
        validation=validation,
        callbacks=callbacks,
    )


def _heads_only(function: str, heads: Sequence[str]) -> LoRAConfig:
    if not heads:
        raise ValueError(f"{function}: heads must name at least one layer")
    return LoRAConfig(target_modules=(), heads=heads)


def _with_adapters(result: Result, model: nn.Module, rounds: Rounds) -> Result:
    adapters = [task_state_dict(model, task) for task in range(rounds.num_tasks)]
    return dataclasses.replace(result, adapters=adapters)


def _check_plain(function: str, model: nn.Module) -> None:
    if adapted_layers(model):
        raise ValueError(
            f"{function}: the model has adapters already; metalora.unload(model) takes them out"
        )
