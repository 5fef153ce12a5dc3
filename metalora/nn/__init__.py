"""Layers that hold something per task, and the way to say which sample belongs to which task."""

from metalora.nn.call_sorted import call_sorted
from metalora.nn.checkpointing import keep_tasks_in_checkpoints
from metalora.nn.context import current_tasks, keep_tasks, tasks
from metalora.nn.embedding import MultiTaskEmbedding
from metalora.nn.head import MultiTaskHead
from metalora.nn.layer import TaskLayer
from metalora.nn.lora_linear import MultiTaskLoRALinear
from metalora.nn.sample_dropout import drops_by_sample, sample_dropout, sample_seeds
from metalora.nn.seen_tasks import SeenTasks
from metalora.nn.symmetric_lora_linear import SymmetricLoRALinear
from metalora.nn.task_batch import TaskBatch

__all__ = [
    "MultiTaskEmbedding",
    "MultiTaskHead",
    "MultiTaskLoRALinear",
    "SeenTasks",
    "SymmetricLoRALinear",
    "TaskBatch",
    "TaskLayer",
    "call_sorted",
    "current_tasks",
    "drops_by_sample",
    "keep_tasks",
    "sample_dropout",
    "sample_seeds",
    "tasks",
]

keep_tasks_in_checkpoints()
