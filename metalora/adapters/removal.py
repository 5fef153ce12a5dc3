"""Taking adapters out of a model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from metalora.adapters.fused_paths import reopen_fused_paths
from metalora.adapters.insert import replace_module
from metalora.adapters.state import adapted_layers, check_adapted, unfreeze_base
from metalora.nn import TaskLayer


def unload(model: nn.Module) -> nn.Module:
    """Makes ``model`` plain again, in place, without the adapters: what PEFT-ML keeps.

    The shared weights stay, with their own Parameter objects; heads are averaged over tasks.

    Args:
        model: an adapted model.

    Returns:
        ``model``, all of whose adapted layers are what they were before. A parameter requires a
        gradient if it did before and was not frozen since, other than by `freeze_base` or a
        fine-tuning.

    Raises:
        ValueError: if ``model`` is not adapted, is itself an adapted layer, or is sharded. It is
            then as it was.
    """
    return _make_plain("unload", model, None)


def merge_and_unload(model: nn.Module, task: int) -> nn.Module:
    """Makes ``model`` plain again, in place, with one task's adapters and head: W + s·B_t A_t.

    A merged weight is a new Parameter; one that was tied to another layer's is then tied no longer,
    which a model of transformers gets into its configuration too.

    Args:
        model: an adapted model.
        task: index of the task, in [0, T).

    Returns:
        ``model``, all of whose adapted layers are what they were before. What requires a gradient
        is as `unload` leaves it; a merged weight requires one if the weight did.

    Raises:
        ValueError: if ``model`` is not adapted, is itself an adapted layer, has no such task, or is
            sharded. It is then as it was.
    """
    return _make_plain("merge_and_unload", model, task)


def _make_plain(function: str, model: nn.Module, task: int | None) -> nn.Module:
    layers = adapted_layers(check_adapted(function, model))
    if isinstance(model, TaskLayer):
        raise ValueError(
            f"{function}: model must hold the adapted layers, got the layer itself, a "
            f"{type(model).__name__}; put it into a container, as in nn.Sequential(model)"
        )
    _check_whole(function, model)
    if task is not None:
        for layer in layers.values():
            layer.check_task(task)
    unfreeze_base(model)
    plain: dict[TaskLayer, nn.Module] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, TaskLayer):
            if layer not in plain:
                plain[layer] = layer.to_linear(task)
            replace_module(model, name, plain[layer])
    reopen_fused_paths(model)
    _note_untied(model)
    return model


def _note_untied(model: nn.Module) -> None:
    """Says so in the configuration if the output embedding has got a weight of its own.

    Where nothing else is tied, that is: the flag is for all ties of a model, and one that is lost
    leaves weights out of what is saved. It is for readers of the configuration; transformers by
    itself does not tie weights that differ.
    """
    for module in model.modules():
        found: Any = module
        tied = getattr(getattr(found, "config", None), "tie_word_embeddings", False)
        if not tied or not hasattr(found, "get_output_embeddings"):
            continue
        output = found.get_output_embeddings()
        if output is None or output.weight is found.get_input_embeddings().weight:
            continue
        ties = found.get_expanded_tied_weights_keys(all_submodels=True).items()
        if not any(found.get_parameter(a) is found.get_parameter(b) for a, b in ties):
            found.config.tie_word_embeddings = False


def _check_whole(function: str, model: nn.Module) -> None:
    """Refuses parameters in shards: what holds the shards would not know the new layers."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None:
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, distributed.DTensor):
            raise ValueError(
                f"{function}: the model must not be sharded, got shards of {name!r}, as "
                "fully_shard makes them; load its full state dict into an adapted model on one "
                "device, and unload there"
            )
