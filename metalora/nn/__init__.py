"""Layers that hold something per task, and the way to say which sample belongs to which task."""

from metalora.nn.head import MultiTaskHead
from metalora.nn.layer import TaskLayer
from metalora.nn.lora_linear import MultiTaskLoRALinear
from metalora.nn.seen_tasks import SeenTasks
from metalora.nn.symmetric_lora_linear import SymmetricLoRALinear
from metalora.nn.task_batch import TaskBatch, current_tasks, tasks

__all__ = [
    "MultiTaskHead",
    "MultiTaskLoRALinear",
    "SeenTasks",
    "SymmetricLoRALinear",
    "TaskBatch",
    "TaskLayer",
    "current_tasks",
    "tasks",
]
