"""Binary tasks: which pair of classes each one tells apart, and samples of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.lib.errors import RunError
from experiments.vision.data import Images

Pair = tuple[int, int]


def binary_tasks(images: Images, pairs: Sequence[Pair]) -> tuple[Images, Tensor]:
    """The images of the given pairs of classes, labelled 0 and 1, sorted by task.

    Returns:
        images whose label says which class of its pair each shows, and their tasks int64 [N].
    """
    index, labels, task_ids = [], [], []
    for task, pair in enumerate(pairs):
        for label, kind in enumerate(pair):
            members = (images.labels == kind).nonzero().flatten()
            index.append(members)
            labels.append(torch.full_like(members, label))
            task_ids.append(torch.full_like(members, task))
    return Images(images.pixels[torch.cat(index)], torch.cat(labels)), torch.cat(task_ids)


def few_shot(images: Images, shots: int, seed: int) -> Images:
    """``shots`` images of a binary task, balanced over its two classes, drawn by seed.

    For the same seed a smaller draw is part of a larger one. An odd one out shows class 0.

    Raises:
        RunError: there are not as many images.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label, count in ((0, (shots + 1) // 2), (1, shots // 2)):
        members = (images.labels == label).nonzero().flatten()
        if count > len(members):
            raise RunError(
                f"--shots {shots}: the test task has only {len(members)} training images of its "
                f"class {label}; at most {2 * len(members)} can be drawn"
            )
        order = torch.randperm(len(members), generator=generator).to(members.device)
        drawn.append(members[order[:count]])
    return images.select(torch.cat(drawn))


def first_per_class(images: Images, count: int) -> Images:
    """The first ``count`` images of every class, for shorter runs."""
    kept = [(images.labels == kind).nonzero().flatten()[:count] for kind in images.labels.unique()]
    return images.select(torch.cat(kept).sort().values)
