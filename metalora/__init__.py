"""Multi-task LoRA meta-training: retrain a model so that every new task is a low-rank step away.

    metalora.adapt(model, config, num_tasks)    adapters of all tasks on the linear layers
    with metalora.tasks(task_ids): model(x)     which sample belongs to which task
    metalora.task_mean(losses, task_ids)        the loss: the mean over tasks
    metalora.TaskOptimizer(model, AdamW)        leaves the adapters of absent tasks alone
    metalora.meta                               LoRA-ML, its baselines, and fine-tuning after them
    metalora.nn, metalora.ops                   the layers and the operators under them
    metalora.linear, metalora.shallow           the paper's linear model and shallow network

The method is that of "Provable Meta-Learning with Low-Rank Adaptations" (NeurIPS 2025).
"""

__version__ = "0.1.0"

from metalora import linear, meta, nn, ops, reference, shallow
from metalora._library import build_info
from metalora.adapters import (
    LoRAConfig,
    adapt,
    base_state_dict,
    freeze_base,
    load_task_state_dict,
    remove,
    reset_adapters,
    task_parameters,
    task_state_dict,
)
from metalora.meta import TaskOptimizer, task_mean
from metalora.nn import TaskBatch, tasks

__all__ = [
    "LoRAConfig",
    "TaskBatch",
    "TaskOptimizer",
    "__version__",
    "adapt",
    "base_state_dict",
    "build_info",
    "freeze_base",
    "linear",
    "load_task_state_dict",
    "meta",
    "nn",
    "ops",
    "reference",
    "remove",
    "reset_adapters",
    "shallow",
    "task_mean",
    "task_parameters",
    "task_state_dict",
    "tasks",
]
