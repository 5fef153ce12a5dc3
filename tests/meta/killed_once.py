"""A user's script for torchrun, whose process 1 kills itself in the first start."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from metalora.meta import Callback, Checkpoint, init_process_group, lora_ml
from tests.meta.test_distribution import WITH_HEADS, network, rounds
from tests.meta.test_several_processes import CONFIG


class KillOnce(Callback):
    def on_step(self, training: Any, loss: torch.Tensor) -> None:
        first = os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0"
        if first and training.steps_done == 5 and training.distribution.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    init_process_group()
    model = network()
    checkpoint = Checkpoint(folder / "training", every_steps=1)
    lora_ml(model, rounds(), CONFIG, WITH_HEADS, callbacks=[KillOnce(), checkpoint])
    if os.environ.get("RANK", "0") == "0":
        save_file(model.state_dict(), folder / "end.safetensors")
    if dist.is_initialized():
        dist.destroy_process_group()
    for path in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # a thread that has ended since
            assert "gloo" not in path.read_text(), "a thread of the process group is left"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
