"""PEFT-ML with any method of the package peft, and the fine-tuning that matches it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from typing_extensions import Unpack

from metalora.adapters import LoRAConfig, as_lora_config
from metalora.adapters.select import check_linear_alone, select
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds, by_task
from metalora.meta.loop import Result, train
from metalora.meta.methods import check_call, retrain
from metalora.meta.peft_adapters import (
    adapter_state_dicts,
    average_heads,
    peft_adapters,
    settings_of,
)
from metalora.meta.restore import as_before
from metalora.meta.seeds import derive_seed, own_random_state
from metalora.meta.steps import GradientStep
from metalora.meta.training import Options, split_options


def peft_ml(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    peft_config: Any,
    *,
    fused: bool = True,
    **options: Unpack[Options],
) -> Result:
    """PEFT-ML (paper, eq. 5): the shared weights are trained together with an adapter per task.

    LoRA that `lora_ml` supports is trained by it, all tasks in one pass. For any other method, such
    as DoRA or (IA)³, the layers are peft's, and the tasks of a round go through the model one after
    the other. Their gradients add up to the same objective, and a task that is absent from a round
    keeps its adapter and the optimiser's state for it.

    Args:
        model: a plain model. Trained in place, and plain again afterwards: it keeps the shared
            weights; of modules that exist once per task (``modules_to_save``), the tasks' mean.
        rounds: the retraining tasks.
        config: settings.
        peft_config: a ``peft.PeftConfig``, or with ``fused`` a `LoRAConfig`.
        fused: whether `lora_ml` trains LoRA; if not, LoRA too has peft's layers.
        options: see `Options`. ``forward`` calls the model itself, which chooses the adapter. In
            validation each sample runs with its own task's adapter; a function of the model calls
            it task by task: ``evaluate(model, by_task(loader), metric)``. Callbacks find the
            ``peft.PeftModel`` in ``training.model``.

    Returns:
        A `Result`; its ``adapters`` are as `lora_ml` returns them, or for peft's own layers what
        ``peft.get_peft_model_state_dict`` gives for each task.

    Raises:
        ImportError: if peft is needed and not installed, or not in a supported version.
        TypeError: if ``peft_config`` is no configuration.
        ValueError: if ``model`` has adapters already, or the method does not fit it, cannot have an
            adapter per task, or does not let the shared weights be trained.
        RuntimeError: if the method fails on ``model``, where the plain model runs, with the
            installed versions of peft and of the model's package.
        DivergedError: if the loss is not finite, see `train`.
    """
    check_call("peft_ml", model, rounds, options)
    lora_config = _as_fused(model, peft_config) if fused else None
    if lora_config is not None:
        return retrain("peft_ml", model, rounds, config, lora_config, options)
    return _train("peft_ml", model, rounds, config, peft_config, options, train_shared=True)


def finetune_peft(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    peft_config: Any,
    **options: Unpack[Options],
) -> Result:
    """Fine-tuning (paper, eq. 2-4) by any method of peft: all weights frozen, adapters per task.

    The tasks go through the model one after the other. `finetune_lora` does LoRA in one pass.

    Args:
        model: a plain model, and the same afterwards, also after an error: running statistics, as
            of batch normalisation, and modes too. ``peft.get_peft_model`` and
            ``peft.set_peft_model_state_dict`` put one of the result's adapters onto it.
        rounds: the tasks to fine-tune for.
        config: settings.
        peft_config: a ``peft.PeftConfig``.
        options: see `peft_ml`.

    Returns:
        A `Result`; its ``adapters`` are what ``peft.get_peft_model_state_dict`` gives for each
        task.

    Raises:
        ImportError: see `peft_ml`.
        TypeError: if ``peft_config`` is no configuration.
        ValueError: if ``model`` has adapters already, or the method does not fit it or cannot have
            an adapter per task.
        RuntimeError: see `peft_ml`.
        DivergedError: if the loss is not finite, see `train`.
    """
    check_call("finetune_peft", model, rounds, options)
    with as_before(model, always=True):
        return _train(
            "finetune_peft", model, rounds, config, peft_config, options, train_shared=False
        )


@own_random_state()
def _train(
    function: str,
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    peft_config: Any,
    options: Options,
    *,
    train_shared: bool,
) -> Result:
    if config.compile:
        raise ValueError(
            f"{function}: compile must be False with peft's own layers, which would be compiled "
            "again for every task; LoRA that lora_ml trains can be compiled"
        )
    if config.parallel == "tasks":
        raise ValueError(
            f"{function}: parallel must be 'data' or None with peft's own layers, of which every "
            "process has those of all tasks, got 'tasks'"
        )
    calls, watch = split_options(options)
    validation = watch.get("validation")
    if validation is not None and not callable(validation):
        watch["validation"] = by_task(validation)
    one_by_one = by_task(rounds)
    plain = {id(p) for p in model.parameters()}
    torch.manual_seed(derive_seed("adapters", config.seed))
    with peft_adapters(
        function, model, peft_config, rounds.num_tasks, train_shared=train_shared
    ) as adapted:
        own = [p for p in adapted.parameters() if id(p) not in plain]
        step = GradientStep(adapted, one_by_one, config, own=own, **calls)
        step.settings["peft"] = settings_of(peft_config)
        result = train(adapted, one_by_one, step, config, **watch)
        if train_shared:
            average_heads(adapted)
        return dataclasses.replace(result, adapters=adapter_state_dicts(adapted, rounds.num_tasks))


def _as_fused(model: nn.Module, config: Any) -> LoRAConfig | None:
    """The configuration for `lora_ml`, or None where it has no such adapters for ``model``."""
    if isinstance(config, LoRAConfig):
        return config
    try:
        lora_config = as_lora_config(config)
        select(model, lora_config)
        check_linear_alone(model, lora_config)
    except (TypeError, ValueError):
        return None
    return lora_config
