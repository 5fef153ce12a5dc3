"""The vision experiment for torchrun, whose process 1 kills itself once there is a checkpoint."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

from experiments.lib import training
from experiments.vision.run import main


def end_after_a_checkpoint(folder: Path) -> None:
    while not list(folder.glob("checkpoints/*.safetensors")):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    training.CHECKPOINT_SECONDS, training.CHECKPOINT_STEPS = 0.0, 1
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        out = Path(sys.argv[sys.argv.index("--out") + 1])
        threading.Thread(target=end_after_a_checkpoint, args=(out,), daemon=True).start()
    main()
