"""Files: checkpoints of trainings; `metalora.io.peft` has adapters as PEFT reads them."""

from metalora.io.checkpoint import Checkpoint, CheckpointError

__all__ = ["Checkpoint", "CheckpointError"]
