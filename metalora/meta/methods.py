"""The ways to retrain a model, and to fine-tune it afterwards.

Every function takes the keywords of `metalora.meta.Options`: ``loss``, ``forward``, ``validation``
and ``callbacks``. Every function raises `DivergedError` where the loss is not finite, see `train`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    freeze_base,
    reset_adapters,
    task_state_dict,
    unload,
)
from metalora.adapters.state import check_plain, nothing_shared_is_trained
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds, check_rounds
from metalora.meta.distribution import Distribution
from metalora.meta.loop import Result, train
from metalora.meta.restore import as_before
from metalora.meta.seeds import derive_seed, own_random_state
from metalora.meta.steps import GradientStep, ReptileStep, distribution_of
from metalora.meta.training import Options, check_options, split_options
from metalora.nn.lora_layer import LoRALayer


def standard(
    model: nn.Module, rounds: Rounds, config: TrainConfig, **options: Unpack[Options]
) -> Result:
    """Standard retraining (paper, eq. 1): one set of weights for all tasks, and no adapters.

    Args:
        model: a plain model, trained in place.
        rounds: the retraining tasks. In pooled order, or with ``weighting="samples"``, the loss is
            the mean over a batch's samples.
        config: settings.
        options: see `Options`.

    Returns:
        A `Result`, whose ``adapters`` are empty.

    Raises:
        ValueError: if ``model`` has adapters.
    """
    check_call("standard", model, rounds, options)
    return train_by_gradient(model, rounds, config, options)


def lora_ml(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    lora_config: Any,
    **options: Unpack[Options],
) -> Result:
    """LoRA-ML (paper, eq. 6): the shared weights are trained together with LoRA for every task.

    Args:
        model: a plain model. Trained in place, and plain again afterwards, also after an error: it
            keeps the shared weights, while the adapters are in the result.
        rounds: the retraining tasks.
        config: settings.
        lora_config: a `LoRAConfig` (also with symmetric adapters, or heads) or a
            ``peft.LoraConfig``.
        options: see `Options`; in validation each sample runs with its own task's adapters.

    Returns:
        A `Result`; its ``adapters`` are the adapters and heads of each task.

    Raises:
        ValueError: if ``model`` has adapters already or its shared weights are all frozen, or
            ``lora_config`` does not fit it.
    """
    return retrain("lora_ml", model, rounds, config, lora_config, options)


def last_layer_ml(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str],
    **options: Unpack[Options],
) -> Result:
    """Last-Layer-ML: the shared weights are trained together with a last layer for every task.

    Args:
        model: a plain model. Trained in place, and plain again afterwards, its head the mean of
            the tasks' heads, which are in the result.
        rounds: the retraining tasks.
        config: settings.
        heads: names of the layers that exist once per task.
        options: see `Options`; in validation each sample runs with its own task's head.

    Returns:
        A `Result`; its ``adapters`` are the heads of each task.

    Raises:
        ValueError: if ``model`` has adapters already or all but its heads is frozen, or ``heads``
            are not in it.
    """
    own = _heads_only("last_layer_ml", heads)
    return retrain("last_layer_ml", model, rounds, config, own, options)


@own_random_state()
def retrain(
    function: str,
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    lora_config: Any,
    options: Options,
) -> Result:
    """`lora_ml`, under the name of the function that was called."""
    check_call(function, model, rounds, options)
    named = model.named_parameters(remove_duplicate=False)
    trainable = {name: parameter.requires_grad for name, parameter in named}
    torch.manual_seed(derive_seed("adapters", config.seed))
    processes = distribution_of(config, rounds)
    try:
        adapt(model, lora_config, rounds.num_tasks, tasks=_held(processes))
        if nothing_shared_is_trained(model):
            raise ValueError(
                f"{function}: all weights that tasks share are frozen, as PEFT leaves them, so "
                "there is nothing to retrain; call model.requires_grad_(True), or fine-tune by "
                f"meta.{'finetune_last_layer' if function == 'last_layer_ml' else 'finetune_lora'}"
            )
        result = train_by_gradient(model, rounds, config, options)
        result = _with_adapters(result, model, processes)
        _average_heads(model, processes)
        return result
    finally:
        if adapted_layers(model):
            unload(model)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(trainable[name])


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
    **options: Unpack[Options],
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
        options: see `Options`.

    Returns:
        A `Result`, whose ``adapters`` are empty.

    Raises:
        ValueError: if ``model`` has adapters, or a setting is outside its range.
    """
    check_call("reptile", model, rounds, options)
    calls, watch = split_options(options)
    step = ReptileStep(
        model,
        rounds,
        config,
        inner_steps=inner_steps,
        inner_lr=inner_lr,
        inner_optimizer=inner_optimizer,
        outer_sign=outer_sign,
        average=average,
        **calls,
    )
    return train(model, rounds, step, config, **watch)


@own_random_state()
def finetune_lora(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    lora_config: Any,
    *,
    fresh_heads: bool = False,
    **options: Unpack[Options],
) -> Result:
    """Fine-tuning with LoRA (paper, eq. 2-4): all weights frozen, a new adapter per task.

    Several tasks are fine-tuned side by side. Their mean loss gives each 1/T of the gradient that
    it would have alone. AdamW is invariant to that factor, and Adam without weight decay; SGD is
    not, and ``grad_clip`` clips all tasks together.

    Parameters are frozen, running statistics are not: batch normalisation normalises a batch by the
    samples of all tasks in it, and updates statistics that the tasks share. To keep those of
    ``model``, run these layers in evaluation mode by a ``forward`` of your own::

        def forward(model, inputs):
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
            return model(inputs)

    Args:
        model: a plain model; it is left adapted and frozen; after an error it is as it was.
            `metalora.merge_and_unload` takes one task's adapters into the weights; it and
            `metalora.unload` end the freezing.
        rounds: the tasks to fine-tune for.
        config: settings.
        lora_config: a `LoRAConfig` or a ``peft.LoraConfig``; its heads are trained too.
        fresh_heads: whether the heads start anew, instead of from the model's.
        options: see `Options`.

    Returns:
        A `Result`; its ``adapters`` are the adapters and heads of each task, copied from the model.

    Raises:
        ValueError: if ``model`` has adapters already, or ``lora_config`` does not fit it.
    """
    check_call("finetune_lora", model, rounds, options)
    with as_before(model):
        torch.manual_seed(derive_seed("adapters", config.seed))
        processes = distribution_of(config, rounds)
        adapt(model, lora_config, rounds.num_tasks, tasks=_held(processes))
        freeze_base(model)
        if fresh_heads:
            reset_adapters(model)
        result = train_by_gradient(model, rounds, config, options)
        return _with_adapters(result, model, processes)


def finetune_last_layer(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str],
    *,
    fresh: bool = True,
    **options: Unpack[Options],
) -> Result:
    """Fine-tuning of the last layer: all else frozen, a new head per task.

    Args:
        model: a plain model; it is left with a head per task, and frozen; after an error it is as
            it was.
        rounds: the tasks to fine-tune for.
        config: settings.
        heads: names of the layers to train.
        fresh: whether the heads start anew, instead of from the model's.
        options: see `Options`.

    Returns:
        A `Result`; its ``adapters`` are the heads of each task, copied from the model.

    Raises:
        ValueError: if ``model`` has adapters already, or ``heads`` are not in it.
    """
    check_call("finetune_last_layer", model, rounds, options)
    heads_only = _heads_only("finetune_last_layer", heads)
    return finetune_lora(model, rounds, config, heads_only, fresh_heads=fresh, **options)


def check_call(function: str, model: nn.Module, rounds: Rounds, options: Options) -> None:
    """Checks what all methods take.

    Raises:
        TypeError: if a keyword is not one of `Options`, or ``rounds`` is no loader for tasks.
        ValueError: if ``model`` has adapters.
    """
    check_options(function, options)
    check_rounds(function, rounds)
    check_plain(function, model)


def train_by_gradient(
    model: nn.Module, rounds: Rounds, config: TrainConfig, options: Options
) -> Result:
    """Trains all parameters that require a gradient with `GradientStep`."""
    calls, watch = split_options(options)
    return train(model, rounds, GradientStep(model, rounds, config, **calls), config, **watch)


def _heads_only(function: str, heads: Sequence[str]) -> LoRAConfig:
    if not heads:
        raise ValueError(f"{function}: heads must name at least one layer")
    return LoRAConfig(target_modules=(), heads=heads)


def _held(processes: Distribution) -> list[int] | None:
    return processes.held if processes.by_task else None


def _with_adapters(result: Result, model: nn.Module, processes: Distribution) -> Result:
    adapters: list[dict[str, Tensor]] = [{} for _ in range(processes.num_tasks)]
    for number, task in enumerate(processes.tasks):
        adapters[task] = task_state_dict(model, number)
    return dataclasses.replace(result, adapters=adapters)


@torch.no_grad()
def _average_heads(model: nn.Module, processes: Distribution) -> None:
    """Gives the heads here the mean over all tasks, where others are in other processes.

    `unload` makes the model's head of it; adapters it drops.
    """
    if not processes.by_task:
        return
    for layer in adapted_layers(model).values():
        if isinstance(layer, LoRALayer):
            continue
        for heads in layer.own_task_parameters().values():
            zero = torch.zeros_like(heads[0])
            first = processes.total(heads[0] if 0 in processes.tasks else zero)
            own = (heads - first).sum(0) if processes.tasks else zero
            heads.copy_(first + processes.total(own) / processes.num_tasks)
