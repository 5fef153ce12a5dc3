"""Hugging Face: rounds of token sequences, packed or padded, also for Trainer and accelerate.

Imported when first used: ``import metalora`` needs no package of theirs.
"""

from metalora.hf.attention import Packing
from metalora.hf.collator import TaskCollator, TaskRounds
from metalora.hf.packing import disable_packing, enable_packing, packing_problem, position_offset
from metalora.hf.passes import SequencePasses
from metalora.hf.sequences import Sequences
from metalora.hf.task_ids import TaskIds, accept_task_ids

__all__ = [
    "Packing",
    "SequencePasses",
    "Sequences",
    "TaskCollator",
    "TaskIds",
    "TaskRounds",
    "accept_task_ids",
    "disable_packing",
    "enable_packing",
    "packing_problem",
    "position_offset",
]
