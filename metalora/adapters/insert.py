"""Putting adapters into a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from metalora._checks import check_count, check_module
from metalora.adapters.config import LoRAConfig, as_lora_config
from metalora.adapters.fused_paths import check_batch_first, close_fused_paths
from metalora.adapters.known_models import check_sample_order, check_without_peft
from metalora.adapters.select import check_fan_in_fan_out, check_linear_alone, select
from metalora.adapters.state import adapted_layers
from metalora.nn import (
    MultiTaskEmbedding,
    MultiTaskHead,
    MultiTaskLoRALinear,
    SymmetricLoRALinear,
    TaskLayer,
)


def adapt(
    model: nn.Module, lora_config: Any, num_tasks: int, *, tasks: Sequence[int] | None = None
) -> nn.Module:
    """Gives the linear layers of ``model`` one adapter per task, in place (paper, eq. 6).

    Linear layers are nn.Linear, and transformers' Conv1D as in GPT-2.

    The layers keep their weights' own Parameter objects and names, so an optimiser, tied weights
    and ``state_dict`` keys of the plain model stay valid. Run the model inside
    ``with metalora.tasks(task_ids):``. `metalora.unload` undoes it.

    Args:
        model: any module; not a bare nn.Linear.
        lora_config: a `LoRAConfig` or a ``peft.LoraConfig``.
        num_tasks: number of tasks T.
        tasks: those of the T tasks that the model is to hold, which are 0, 1, ... to it: for task
            parallelism, see `metalora.meta.Distribution`. They start as they do among all tasks.
            None means all.

    Returns:
        ``model``.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a name is unknown, a layer cannot be adapted, or has been already. The model
            is then as it was.
    """
    check_module("adapt", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError(
            "adapt: the model must not be wrapped in DistributedDataParallel, which would not know "
            "the adapters; adapt the model first, then wrap it"
        )
    check_without_peft(model)
    config = as_lora_config(lora_config)
    num_tasks = check_count("adapt", "num_tasks", num_tasks)
    held = num_tasks if tasks is None else len(tasks)
    for name, layer in adapted_layers(model).items():
        if layer.num_tasks != held:
            raise ValueError(
                f"adapt: num_tasks must be {layer.num_tasks}, as {name!r} has adapters for that "
                f"many tasks already, got {num_tasks}"
            )
    selection = select(model, config)
    if config is not lora_config:
        check_linear_alone(model, config)
        check_fan_in_fan_out(lora_config, selection)
    places = [names for _, names in selection.targets + selection.heads]
    if num_tasks > 1:
        names_of_all = [name for names in places for name in names]
        check_batch_first(model, names_of_all)
        check_sample_order(model, names_of_all)
    layers = [
        _holding(tasks, _adapter_on(linear, names[0], config, num_tasks))
        for linear, names in selection.targets
    ]
    layers += [
        _holding(tasks, _one_per_task(module, names[0], num_tasks))
        for module, names in selection.heads
    ]
    for layer, names in zip(layers, places, strict=True):
        for name in names:
            replace_module(model, name, layer)
    close_fused_paths(model)
    return model


def _holding(tasks: Sequence[int] | None, layer: TaskLayer) -> TaskLayer:
    if tasks is not None:
        layer.hold_tasks(tasks)
    return layer


def _one_per_task(module: nn.Module, name: str, num_tasks: int) -> TaskLayer:
    if isinstance(module, nn.Embedding):
        return MultiTaskEmbedding.from_embedding(module, num_tasks, name=name)
    assert isinstance(module, nn.Linear)
    return MultiTaskHead.from_linear(module, num_tasks, name=name)


def _adapter_on(linear: nn.Module, name: str, config: LoRAConfig, num_tasks: int) -> TaskLayer:
    kind = SymmetricLoRALinear if config.symmetric else MultiTaskLoRALinear
    return kind.from_linear(
        linear,
        num_tasks,
        config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        route=config.route,
        keep_merged=config.keep_merged,
        name=name,
    )


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts ``new`` where ``model`` has the module called ``name``."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, new)
