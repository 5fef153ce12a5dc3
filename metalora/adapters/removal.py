"""Taking adapters out of a model."""

from __future__ import annotations

import sys

from torch import nn

from metalora.adapters.fused_paths import reopen_fused_paths
from metalora.adapters.insert import replace_module
from metalora.adapters.state import _adapted
from metalora.nn import TaskLayer


def remove(model: nn.Module, task: int | None = None) -> nn.Module:
    """Makes ``model`` plain again, in place.

    Args:
        model: an adapted model.
        task: None drops the adapters, which leaves the shared weights' own Parameter objects, and
            averages the heads over tasks: what PEFT-ML keeps of its retraining. A task keeps its
            head and merges its adapters into new weights, W + s·B_t A_t; one that was tied to
            another layer's is then tied no longer.

    Returns:
        ``model``, all of whose adapted layers are nn.Linear again.

    Raises:
        ValueError: if ``model`` is not adapted, has no such task, or is sharded. It is then as it
            was.
    """
    _adapted("remove", model)
    _check_whole(model)
    plain: dict[TaskLayer, nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, TaskLayer):
            if layer not in plain:
                plain[layer] = layer.to_linear(task)
            replace_module(model, name, plain[layer])
    reopen_fused_paths(model)
    return model


def _check_whole(model: nn.Module) -> None:
    """Refuses parameters in shards: what holds the shards would not know the new layers."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is None:
        return
    for name, parameter in model.named_parameters():
        if isinstance(parameter, distributed.DTensor):
            raise ValueError(
                f"remove: the model must not be sharded, got shards of {name!r}, as fully_shard "
                "makes them; load its full state dict into an adapted model on one device, and "
                "remove there"
            )
