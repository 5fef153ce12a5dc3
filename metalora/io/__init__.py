"""Files: checkpoints of trainings."""

from metalora.io.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]
