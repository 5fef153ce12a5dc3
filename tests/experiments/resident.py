"""Prints as JSON how much memory retraining of the vision experiment keeps resident.

Run as a program, in a process of its own: memory that earlier work has freed would be used again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.lib.machine import keep_freed_memory
from experiments.vision.data import Dataset, Images
from experiments.vision.mixer import Mixer
from experiments.vision.protocol import CPU_PATCHES, Protocol
from experiments.vision.settings import Settings
from metalora.meta import Callback, Training

PER_TASK, EPOCHS = 1024, 4


def main() -> None:
    """Gives all in MiB: of each method named, what is resident after each epoch, less the start.

    As freed memory is kept, that is also the most there was so far. Besides: what the forward pass
    keeps for the backward pass, of one pass of the model and of a whole round at once.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    pixels = torch.randint(256, (10 * PER_TASK // 2, 1, 8, 8), dtype=torch.uint8)
    labels = torch.arange(10).repeat_interleave(PER_TASK // 2)
    images = Images(pixels, labels)
    dataset = Dataset("digits", images, images, tuple(map(str, range(10))), "")

    def retrained(method: str, watch: _Watch, **given: Any) -> Mixer:
        settings = Settings(data="digits", device="cpu", **given)
        protocol = Protocol(settings.resolved("cpu"), dataset, torch.device("cpu"))
        return protocol.retrain(method, 0, watch)[0]

    retrained("lora-ml", _Watch(), epochs=1, batch_size=4, train_per_class=4)  # imports the rest
    start = _resident()
    epochs: dict[str, list[float]] = {}
    for method in sys.argv[1:]:
        watch = _Watch()
        batch = PER_TASK * (4 if method == "standard" else 1)
        model = retrained(method, watch, epochs=EPOCHS, batch_size=batch)
        epochs[method] = [resident - start for resident in watch.epochs]
    per_image = _saved(model, 32) / 32
    of_pass = per_image * CPU_PATCHES / model.config.patches
    found = {"epochs": epochs, "pass": of_pass, "round": per_image * 4 * PER_TASK}
    print(json.dumps(found))


class _Watch(Callback):
    def __init__(self) -> None:
        self.epochs: list[float] = []

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        self.epochs.append(_resident())


def _resident() -> float:
    """MiB of the process in memory, without what it maps of files, such as libraries."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def _saved(model: Mixer, images: int) -> float:
    """MiB that the forward pass keeps for the backward pass, parameters aside."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    config = model.config
    inputs = torch.zeros(images, config.channels, config.image_size, config.image_size)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model.train()(inputs), torch.zeros(images, dtype=torch.int64))
    return sum(storage.nbytes() for storage in kept.values()) / 2**20


if __name__ == "__main__":
    main()
