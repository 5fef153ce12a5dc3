"""Large batches on a CPU: several small passes of the model instead of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from metalora._checks import check_count
from metalora.meta import Batch


@dataclass(frozen=True)
class ImagePasses:
    """A ``collate`` (see `metalora.meta.Batch`) that gives the model few images at a time.

    The loss and its gradients are those of the whole batch, up to rounding; what the backward pass
    needs is held for one pass alone.

    Attributes:
        images: in a pass, at most.
    """

    images: int

    def __post_init__(self) -> None:
        check_count("ImagePasses", "images", self.images)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """The fewest passes of about equal size, in the order of the batch, sorted by task."""
        total = len(batch.targets)
        passes = -(-total // self.images)
        for i in range(passes):
            rows = slice(total * i // passes, total * (i + 1) // passes)
            counts = torch.bincount(batch.task_ids[rows]).tolist()
            yield batch.take(rows, tuple(counts))
