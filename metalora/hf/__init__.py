"""Hugging Face: metalora with transformers.Trainer and accelerate; imported by name only."""

from metalora.hf.collator import TaskCollator, TaskRounds
from metalora.hf.task_ids import TaskIds, accept_task_ids

__all__ = ["TaskCollator", "TaskIds", "TaskRounds", "accept_task_ids"]
