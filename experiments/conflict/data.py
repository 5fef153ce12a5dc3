"""The tasks: pairs of image classes, with what each may see of the images.

A class's training images are shuffled and cut into three parts: few-shot images of validation
tasks, of test tasks, and images to retrain on. Its held-out images are cut in two: what is chosen
(epochs, fine-tuning rates) is chosen on the first half, what is reported of test tasks is measured
on the second.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.lib.unused import at_most
from experiments.vision.data import Dataset, Images, Pair, few_shot
from metalora.meta import derive_seed

RETRAINING_CLASSES = range(8)
VALIDATION_CLASS, TEST_CLASS = 8, 9
UNSEEN = ("validation", "test")
UNSEEN_SHARE = 6  # one of so many training images of a class is for each kind of unseen tasks


def groups(pairs: str) -> dict[str, tuple[Pair, ...]]:
    """Returns the pairs of classes of each group of tasks; the first class of a pair has label 0.

    Args:
        pairs: "all" retrains on every pair of classes, so that most classes have label 0 in some
            tasks and 1 in others. "consistent" retrains on pairs of one of the classes 0 to 3 and
            one of 4 to 7, and a class has the same label in all tasks, unseen ones too.
    """
    retraining = tuple(itertools.combinations(RETRAINING_CLASSES, 2))
    second: Sequence[int] = ()  # the classes with label 1
    if pairs == "consistent":
        second = RETRAINING_CLASSES[4:]
        retraining = tuple(itertools.product(RETRAINING_CLASSES[:4], second))

    def with_new(new: int) -> tuple[Pair, ...]:
        return tuple((new, c) if c in second else (c, new) for c in RETRAINING_CLASSES)

    unseen = (with_new(VALIDATION_CLASS), with_new(TEST_CLASS))
    return {"retraining": retraining, **dict(zip(UNSEEN, unseen, strict=True))}


@dataclass(frozen=True)
class Part:
    """Samples of some tasks.

    Attributes:
        inputs: uint8 images [N, C, S, S], or their features float32 [N, width].
        labels: int64 [N], 0 or 1.
        ids: int64 [N], the task of each, from 0.
        tasks: int64 [N], its place among the tasks of all groups.
    """

    inputs: Tensor
    labels: Tensor
    ids: Tensor
    tasks: Tensor

    def to(self, device: torch.device) -> Part:
        """Returns the samples on a device."""
        tensors = self.inputs, self.labels, self.ids, self.tasks
        return Part(*(tensor.to(device) for tensor in tensors))

    def repeated(self, times: int) -> Part:
        """Returns the samples several times, each time as tasks of their own."""
        count = int(self.ids.max()) + 1
        ids = torch.cat([self.ids + count * i for i in range(times)])
        inputs = torch.cat([self.inputs] * times)
        return Part(inputs, self.labels.repeat(times), ids, self.tasks.repeat(times))


class Tasks:
    """All tasks of one trial.

    Args:
        dataset: the images.
        of: the pairs of classes of each group, see `groups`.
        flipped: bool [number of tasks of all groups], whose labels are exchanged.
        seed: of the cut of a class's training images, and of few-shot draws.
        train_per_class: images of each class that a retraining task has. A class's images are dealt
            to its tasks in turn; only if they do not suffice do tasks share some.
        held_out_per_class: held-out images of each class at most, for choices and reports each.

    Attributes:
        notes: a line for each number of images that no class has.
    """

    def __init__(
        self,
        dataset: Dataset,
        of: Mapping[str, Sequence[Pair]],
        flipped: Tensor,
        seed: int,
        train_per_class: int,
        held_out_per_class: int,
    ):
        self._dataset, self._of, self._flipped, self._seed = dataset, of, flipped, seed
        # Which task of all, of all groups, is the first of its group.
        starts = itertools.accumulate(map(len, of.values()), initial=0)
        self._first = dict(zip(of, starts, strict=False))
        self._train_per_class, self._held_out_per_class = train_per_class, held_out_per_class
        self._members: list[dict[str, Tensor]] = []  # of each class, by group
        for kind in range(10):
            own = (dataset.train.labels == kind).nonzero().flatten()
            generator = torch.Generator().manual_seed(derive_seed("cut", seed, kind))
            own = own[torch.randperm(len(own), generator=generator)]
            self._members.append(_cut(own) if kind in RETRAINING_CLASSES else {})
            self._members[kind].setdefault("validation", own)
            self._members[kind].setdefault("test", own)
        most = max(len(self._members[kind]["retraining"]) for kind in RETRAINING_CLASSES)
        self.notes = at_most("train_per_class", train_per_class, most, "a class has")
        most = int(torch.bincount(dataset.held_out.labels).max()) // 2
        self.notes += at_most("held_out_per_class", held_out_per_class, most, "half a class has")

    def retraining(self) -> Part:
        """Returns the retraining tasks' images to train on."""
        visits = [0] * 10
        of_class = 2 * len(self._of["retraining"]) // len(RETRAINING_CLASSES)  # a class's tasks
        parts = []
        for pair in self._of["retraining"]:
            chosen = []
            for kind in pair:
                own, visit = self._members[kind]["retraining"], visits[kind]
                start = visit * len(own) // of_class
                places = (start + torch.arange(min(self._train_per_class, len(own)))) % len(own)
                chosen.append(own[places])
                visits[kind] += 1
            parts.append(self._pair(self._dataset.train, *chosen))
        return self._joined("retraining", parts)

    def few(self, group: str, shots: int, draws: int) -> Part:
        """Draws ``shots`` training images of each unseen task of a group, ``draws`` times.

        Each draw of a task is a task of its own. For the same seed a smaller draw is part of a
        larger one.

        Raises:
            RunError: there are not as many images.
        """
        parts = []
        for draw in range(draws):
            for number, (first, second) in enumerate(self._of[group]):
                chosen = self._members[first][group], self._members[second][group]
                own = self._pair(self._dataset.train, *chosen)
                seed = derive_seed(f"few-shot {group}", self._seed, draw, number)
                parts.append(few_shot(own, shots, seed))
        return self._joined(group, parts)

    def held_out(self, group: str) -> Part:
        """Returns the held-out images of a group's tasks: those to report on, or to choose by."""
        half = 1 if group == "test" else 0
        parts = []
        for pair in self._of[group]:
            of = [(self._dataset.held_out.labels == kind).nonzero().flatten() for kind in pair]
            chosen = [own[half::2][: self._held_out_per_class] for own in of]
            parts.append(self._pair(self._dataset.held_out, *chosen))
        return self._joined(group, parts)

    @staticmethod
    def _pair(images: Images, first: Tensor, second: Tensor) -> Images:
        """Returns two classes' images, labelled 0 and 1."""
        labels = torch.cat([torch.zeros_like(first), torch.ones_like(second)])
        return Images(images.pixels[torch.cat([first, second])], labels)

    def _joined(self, group: str, parts: list[Images]) -> Part:
        """Joins the images of a group's tasks, which may come several times; flips labels."""
        count = len(self._of[group])
        sizes = torch.tensor([len(part) for part in parts])
        ids = torch.arange(len(parts)).repeat_interleave(sizes)
        tasks = self._first[group] + ids % count
        labels = torch.cat([part.labels for part in parts])
        labels = torch.where(self._flipped[tasks], 1 - labels, labels)
        return Part(torch.cat([part.pixels for part in parts]), labels, ids, tasks)


def _cut(members: Tensor) -> dict[str, Tensor]:
    """Cuts a class's images into those of each group of tasks."""
    few = len(members) // UNSEEN_SHARE
    validation, test, retraining = members.split([few, few, len(members) - 2 * few])
    return {"validation": validation, "test": test, "retraining": retraining}
