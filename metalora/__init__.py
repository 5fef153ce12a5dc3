"""Multi-task LoRA meta-training: retrain a model so that every new task is a low-rank step away.

    metalora.adapt(model, lora, num_tasks)      adapters of all tasks on the linear layers
    with metalora.tasks(task_ids): model(x)     which sample belongs to which task
    metalora.call_sorted(model, x)              the same, sorted by task once for all layers
    metalora.task_mean(losses, task_ids)        the loss: the mean over tasks
    metalora.TaskOptimizer(model, AdamW)        leaves the adapters of absent tasks alone
    metalora.meta                               LoRA-ML, its baselines, and fine-tuning after them
    metalora.nn, metalora.ops                   the layers and the operators under them
    metalora.hf, metalora.io                    Hugging Face models and trainers; PEFT's folders
    metalora.linear, metalora.shallow           the paper's linear model and shallow network

The method is that of "Provable Meta-Learning with Low-Rank Adaptations" (NeurIPS 2025).
"""

__version__ = "0.1.0"

import importlib
from typing import Any

from metalora import linear, meta, nn, ops, reference, shallow
from metalora._library import build_info
from metalora.adapters import (
    LoRAConfig,
    adapt,
    base_state_dict,
    freeze_base,
    load_base_state_dict,
    load_task_state_dict,
    merge_and_unload,
    reset_adapters,
    task_parameters,
    task_state_dict,
    unload,
)
from metalora.meta import TaskOptimizer, task_mean
from metalora.nn import TaskBatch, call_sorted, tasks

_LAZY = ("hf", "io")  # imported when first used: they are for optional packages


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"metalora.{name}")
    raise AttributeError(f"module 'metalora' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


__all__ = [
    "LoRAConfig",
    "TaskBatch",
    "TaskOptimizer",
    "__version__",
    "adapt",
    "base_state_dict",
    "build_info",
    "call_sorted",
    "freeze_base",
    "hf",
    "io",
    "linear",
    "load_base_state_dict",
    "load_task_state_dict",
    "merge_and_unload",
    "meta",
    "nn",
    "ops",
    "reference",
    "reset_adapters",
    "shallow",
    "task_mean",
    "task_parameters",
    "task_state_dict",
    "tasks",
    "unload",
]
