"""Taking adapters out of a model."""

from __future__ import annotations

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
        ValueError: if ``model`` is not adapted or has no such task.
    """
    _adapted("remove", model)
    plain: dict[TaskLayer, nn.Linear] = {}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, TaskLayer):
            if layer not in plain:
                plain[layer] = layer.to_linear(task)
            replace_module(model, name, plain[layer])
    reopen_fused_paths(model)
    return model
