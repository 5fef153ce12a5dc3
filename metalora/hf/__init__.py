"""Hugging Face: rounds of token sequences, packed or padded, also for Trainer and accelerate.

Imported when first used: ``import metalora`` needs no package of theirs.
"""

from typing import TYPE_CHECKING, Any

from metalora.hf.attention import Packing
from metalora.hf.collator import TaskCollator, TaskRounds
from metalora.hf.packing import disable_packing, enable_packing, packing_problem, position_offset
from metalora.hf.passes import SequencePasses
from metalora.hf.sequences import Sequences
from metalora.hf.task_ids import TaskIds, accept_task_ids

if TYPE_CHECKING:
    from metalora.hf.trainer import RoundsCallback

__all__ = [
    "Packing",
    "RoundsCallback",
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


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first used."""
    if name != "RoundsCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from metalora.hf.trainer import RoundsCallback

    return RoundsCallback
