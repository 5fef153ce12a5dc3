"""Batches that hold samples of several tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, compress
from typing import Any, Protocol

import torch
from torch import Tensor

from metalora._checks import check_choice, check_count, check_tensor
from metalora.meta.identity import digest_of_data, identity_of
from metalora.meta.mean import sample_weights
from metalora.meta.seeds import derive_seed, generator, own_random_state

ORDERS = ("rounds", "proportional", "interleaved", "blocked", "pooled")
MIXED = ("proportional", "pooled")  # batches of one size, cut from the samples of all tasks
WEIGHTINGS = ("tasks", "samples")


@dataclass(frozen=True)
class Batch:
    """Samples of one step.

    Attributes:
        inputs: what the model is called with: a tensor [B, ...] or a mapping of such; after
            ``collate`` whatever the model takes.
        targets: [B, ...].
        task_ids: int64 [B], the task of each sample.
        counts: samples of each task, T numbers; None where the host does not know them. Given,
            the samples are sorted by task.
        lengths: rows of each sample, B numbers, where the inputs are packed, see `metalora.tasks`.
        weights: [B], each sample's part in the loss; None leaves that to ``weighting``.
        places: int64 [B] on the CPU, the place of each sample in the whole batch, where this is the
            part of one process, see `metalora.meta.Distribution`.
        collate: turns this batch into one or more model inputs, in passes that each come
            with some of the samples and their weights (of `take`): for samples that have to be
            padded or packed first, or batches too large for memory. None: ``inputs`` are ready.
        sizes: [B], what each sample counts in the mean that it is in, such as its number of tokens;
            None: all the same.
        weighting: what counts the same in the loss, "tasks" or "samples", see `RoundLoader`.
    """

    inputs: Any
    targets: Tensor
    task_ids: Tensor
    counts: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    weights: Tensor | None = None
    places: Tensor | None = None
    collate: Collate | None = None
    sizes: Tensor | None = None
    weighting: str = "tasks"

    def tasks_present(self) -> list[int]:
        """The tasks with samples here, ascending; without ``counts`` it waits for the device."""
        if self.counts is None:
            return self.task_ids.unique().tolist()
        last = len(self.counts) - 1
        if last >= 0 and 0 < self.counts[last] == len(self.task_ids):  # a part of `by_task`
            return [last]
        return list(compress(range(len(self.counts)), self.counts))

    def by_task(self) -> list[Batch]:
        """One batch per task that has samples here."""
        parts = []
        ends = None if self.counts is None else list(accumulate(self.counts))
        for task in self.tasks_present():
            if self.counts is None or ends is None:
                rows: Any = (self.task_ids == task).nonzero()[:, 0]
                count = len(rows)
            else:
                count = self.counts[task]
                rows = slice(ends[task] - count, ends[task])
            parts.append(self.take(rows, (0,) * task + (count,)))
        return parts

    def take(self, rows: Tensor | slice, counts: tuple[int, ...] | None = None) -> Batch:
        """The batch of some samples.

        Args:
            rows: int64 [n] or a slice.
            counts: of each task among them, if they are sorted by task.

        Raises:
            ValueError: if the samples are packed already.
        """
        if self.lengths is not None:
            raise ValueError("Batch.take: the samples are packed and cannot be taken apart")
        return replace(
            self,
            inputs=take_rows(self.inputs, rows),
            targets=self.targets[rows],
            task_ids=self.task_ids[rows],
            counts=counts,
            weights=None if self.weights is None else self.weights[rows],
            sizes=None if self.sizes is None else self.sizes[rows],
            places=None if self.places is None else self.places[_on_host(rows)],
        )

    def loss_weights(self) -> Tensor:
        """[B], each sample's part in the loss: ``weights`` or, without, float64 by ``weighting``.

        Raises:
            ValueError: if the weighting is not known.
        """
        if self.weights is not None:
            return self.weights
        check_choice("Batch", "weighting", self.weighting, WEIGHTINGS)
        ids = self.task_ids
        together = torch.zeros_like(ids) if self.weighting == "samples" else ids
        return sample_weights(together, sizes=self.sizes)

    def passes(self) -> Iterable[Batch]:
        """The batches that the model is called with, one after the other."""
        return (self,) if self.collate is None else self.collate(self)


Collate = Callable[[Batch], Iterable[Batch]]


def _on_host(rows: Tensor | slice) -> Tensor | slice:
    return rows.cpu() if isinstance(rows, Tensor) else rows


def take_rows(inputs: Any, rows: Tensor | slice) -> Any:
    """``rows`` of a tensor [B, ...], or of every tensor of a mapping."""
    if isinstance(inputs, Mapping):
        return {name: value[rows] for name, value in inputs.items()}
    return inputs[rows]


class Rounds(Protocol):
    """What the training loop needs of a loader, such as `RoundLoader`.

    A loader may also have a method ``identity()``, see `RoundLoader.identity`. Without it,
    `metalora.meta.Checkpoint` cannot tell whether a training resumes with the same data.
    """

    num_tasks: int
    """Number of tasks T."""

    @property
    def pooled(self) -> bool:
        """Whether batches ignore tasks, so that the loss is the mean over samples."""
        ...

    @property
    def rounds_per_task(self) -> Sequence[int]:
        """How many batches of an epoch have samples of each task, or the most there can be."""
        ...

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Batch]: ...


def check_rounds(function: str, rounds: Any, argument: str = "rounds") -> None:
    """Raises TypeError if ``rounds`` is no loader for tasks, such as a ``DataLoader``."""
    if not hasattr(rounds, "num_tasks"):
        raise TypeError(
            f"{function}: {argument} must be a metalora.meta.RoundLoader, or have all that "
            f"metalora.meta.Rounds has, got {type(rounds).__name__}; {_OWN_DATA}"
        )


_OWN_DATA = (
    "RoundLoader takes tensors or a mapping of them, or of other data the samples' numbers, "
    "torch.arange(N), with collate= to fetch them (docs/how-to/own-data.md)"
)


def samples_per_task(rounds: Rounds) -> Sequence[int]:
    """How many samples each task has in an epoch, by which tasks are spread over processes.

    Of a loader that does not say so, ``rounds_per_task`` is taken.
    """
    found: Sequence[int] | None = getattr(rounds, "samples_per_task", None)
    return rounds.rounds_per_task if found is None else found


def by_task(rounds: Rounds) -> Rounds:
    """The same rounds, of which the model gets one task at a time, in one pass or more.

    For models that cannot take several tasks at once; the loss and the metrics stay the same.
    """
    return _ByTask(rounds)


class _ByTask:
    def __init__(self, rounds: Rounds) -> None:
        self.rounds, self.num_tasks, self.pooled = rounds, rounds.num_tasks, rounds.pooled

    @property
    def order(self) -> str | None:
        return getattr(self.rounds, "order", None)

    @property
    def rounds_per_task(self) -> Sequence[int]:
        return self.rounds.rounds_per_task

    @property
    def samples_per_task(self) -> Sequence[int]:
        return samples_per_task(self.rounds)

    def set_epoch(self, epoch: int) -> None:
        self.rounds.set_epoch(epoch)

    def identity(self) -> dict[str, Any]:
        return {"rounds": identity_of(self.rounds)}

    def __len__(self) -> int:
        return len(self.rounds)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.rounds:
            yield replace(batch, collate=partial(_passes_by_task, batch.collate))


def _passes_by_task(collate: Collate | None, batch: Batch) -> Iterator[Batch]:
    for part in replace(batch, collate=collate).by_task():
        yield from part.passes()


class RoundLoader:
    """Batches of samples from tensors; by default rounds, each with samples of every task.

    An epoch gives every sample once, in one of these orders:

    - "rounds": up to ``batch_size`` samples of every task per batch. Tasks with fewer samples run
      out earlier and are absent from the last rounds.
    - "proportional": rounds of equal size, of at most ``batch_size`` samples in all, and of each
      task in proportion to how many it has, so that no task runs out: for many tasks of unequal
      size. A task with fewer samples than there are rounds is absent from some of them.
    - "interleaved": a batch of task 0, a batch of task 1, and so on, then the next batch of each
      task that has samples left.
    - "blocked": all batches of task 0, then all of task 1, and so on.
    - "pooled": batches drawn from all tasks together, as if they were one; the loss is the mean
      over a batch's samples.

    A batch of one task is one optimiser step, and its loss is the mean over its samples. Batches
    are sorted by task. Order and augmentation are a pure function of (seed, epoch).

    Args:
        inputs: [N, ...], or a mapping of such tensors, on the device of the batches.
        targets: [N, ...], on the same device.
        task_ids: int64 [N], tasks numbered 0..T-1 without gaps; -1 leaves a sample out.
        batch_size: samples per task and batch; with "proportional" and "pooled", samples per batch.
        seed: of order and augmentation.
        shuffle: whether the order changes with each epoch; without, it is that of the tensors.
        order: "rounds", "proportional", "interleaved", "blocked" or "pooled", see above.
        max_rounds: end the epoch after so many batches.
        transform: ``transform(inputs, generator) -> inputs``, applied to each batch. What it draws
            from torch's own generator is repeatable too.
        collate: see `Batch`. Where samples do not fit into tensors, ``inputs`` may be their
            numbers, which it turns into the model's inputs.
        sizes: [N], what each sample counts in its task's mean (or in a batch's, see ``weighting``),
            on the same device, such as its number of tokens: a task's loss is then the mean over
            its tokens where ``loss`` returns each sample's mean over tokens. None: a task's loss
            is the mean over its samples.
        num_tasks: T, where there are more tasks than have samples here, as in a validation for
            which tasks with few samples had none to spare: those are in no batch. None: the tasks
            that ``task_ids`` have, each of which must have samples.
        weighting: "tasks": the loss of a batch is the mean over the tasks present of each task's
            mean (paper, eq. 5). "samples": it is the mean over all samples of the batch, or with
            ``sizes`` over all their tokens, so that large tasks count more. For Reptile and with
            ``step_per="task"``, which step on one task at a time, both are the same; "pooled"
            batches have the second anyway.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if lengths differ, a task has no samples, or a number, the order or the
            weighting is not one of those allowed.
    """

    def __init__(
        self,
        inputs: Tensor | Mapping[str, Tensor],
        targets: Tensor,
        task_ids: Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        order: str = "rounds",
        max_rounds: int | None = None,
        transform: Callable[[Any, torch.Generator], Any] | None = None,
        collate: Collate | None = None,
        sizes: Tensor | None = None,
        num_tasks: int | None = None,
        weighting: str = "tasks",
    ) -> None:
        self.batch_size = check_count("RoundLoader", "batch_size", batch_size)
        self.seed = check_count("RoundLoader", "seed", seed, minimum=0)
        self.order = check_choice("RoundLoader", "order", order, ORDERS)
        weighting = check_choice("RoundLoader", "weighting", weighting, WEIGHTINGS)
        self.weighting = "samples" if self.order == "pooled" else weighting
        if max_rounds is not None:
            max_rounds = check_count("RoundLoader", "max_rounds", max_rounds)
        ids = _checked_ids(inputs, targets, task_ids, sizes)
        self.sizes = sizes
        self.inputs, self.targets, self.task_ids = inputs, targets, task_ids.to(targets.device)
        self.shuffle, self.transform, self.collate = shuffle, transform, collate
        self.num_tasks = _checked_number(ids, num_tasks)
        self._ids = ids
        kept = (ids >= 0).nonzero()[:, 0]
        counts = torch.bincount(ids[kept], minlength=self.num_tasks).tolist()
        self._of_task = kept[ids[kept].argsort(stable=True)].split(counts)
        self._batches_per_task = [self._batches(len(samples)) for samples in self._of_task]
        self._max_rounds = max_rounds
        self._epoch = 0

    def identity(self) -> dict[str, Any]:
        """What determines the batches of every epoch, in values that JSON can hold.

        These are the settings, the names of ``transform`` and ``collate``, and a digest of each
        tensor (see `metalora.meta.identity.digest_of_data`).
        """
        return {
            "batch_size": self.batch_size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "order": self.order,
            "max_rounds": self._max_rounds,
            "transform": identity_of(self.transform),
            "collate": identity_of(self.collate),
            "inputs": digest_of_data(self.inputs),
            "targets": digest_of_data(self.targets),
            "task_ids": digest_of_data(self.task_ids),
            # Only where the ids do not say it, as in files of before there was such an argument.
            **({} if len(self._of_task[-1]) else {"num_tasks": self.num_tasks}),
            **({} if self.sizes is None else {"sizes": digest_of_data(self.sizes)}),
            **({} if self.pooled or self.weighting == "tasks" else {"weighting": self.weighting}),
        }

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration."""
        self._epoch = check_count("RoundLoader.set_epoch", "epoch", epoch, minimum=0)

    @property
    def pooled(self) -> bool:
        """Whether batches ignore tasks, so that the loss is the mean over samples."""
        return self.order == "pooled"

    def __len__(self) -> int:
        if self.order in MIXED:
            batches = self._batches(sum(map(len, self._of_task)))
        elif self.order == "rounds":
            batches = max(self._batches_per_task)
        else:
            batches = sum(self._batches_per_task)
        return batches if self._max_rounds is None else min(batches, self._max_rounds)

    @property
    def rounds_per_task(self) -> list[int]:
        """How many batches of an epoch have samples of each task.

        With "pooled" and "proportional" it is the most there can be.
        """
        if self.order in MIXED:
            return [min(len(samples), len(self)) for samples in self._of_task]
        found = [0] * self.num_tasks
        for task in (task for visits in self._visits() for task, _ in visits):
            found[task] += 1
        return found

    @property
    def samples_per_task(self) -> list[int]:
        """How many samples each task has."""
        return [len(samples) for samples in self._of_task]

    def __iter__(self) -> Iterator[Batch]:
        device = self.targets.device
        rounds = self._rounds()
        if not rounds:
            return
        order = torch.cat([samples for samples, _ in rounds]).to(device)  # one copy an epoch
        augment = generator(device, "augment", self.seed, self._epoch)
        start = 0
        for number, (samples, counts) in enumerate(rounds):
            chosen = order[start : start + len(samples)]
            start += len(samples)
            inputs = take_rows(self.inputs, chosen)
            if self.transform is not None:
                with own_random_state():  # what it draws without its generator
                    torch.manual_seed(derive_seed("transform", self.seed, self._epoch, number))
                    inputs = self.transform(inputs, augment)
            targets, task_ids = self.targets[chosen], self.task_ids[chosen]
            sizes = None if self.sizes is None else self.sizes[chosen]
            yield Batch(
                inputs,
                targets,
                task_ids,
                counts,
                collate=self.collate,
                sizes=sizes,
                weighting=self.weighting,
            )

    def _rounds(self) -> list[tuple[Tensor, tuple[int, ...]]]:
        """Per batch the samples [B] in order, and how many each task has of them."""
        order = generator(torch.device("cpu"), "order", self.seed, self._epoch)
        if self.order in MIXED:
            cut = self._cut_pooled if self.order == "pooled" else self._cut_in_proportion
            batches = [self._by_task(b) for b in cut(order)[: len(self)]]
            counts = [torch.bincount(self._ids[b], minlength=self.num_tasks) for b in batches]
            return [(b, tuple(c.tolist())) for b, c in zip(batches, counts, strict=True)]
        chunks = [self._shuffled(s, order).split(self.batch_size) for s in self._of_task]
        rounds = []
        for visits in self._visits():
            parts = {task: chunks[task][i] for task, i in visits}
            sizes = [0] * self.num_tasks
            for task, part in parts.items():
                sizes[task] = len(part)
            rounds.append((torch.cat(list(parts.values())), tuple(sizes)))
        return rounds

    def _cut_pooled(self, order: torch.Generator) -> Sequence[Tensor]:
        every = self._shuffled(torch.cat(self._of_task).sort().values, order)
        return every.split(self.batch_size)

    def _cut_in_proportion(self, order: torch.Generator) -> Sequence[Tensor]:
        """Cuts all samples where sample number j of a task's n stands at (j + u) / n.

        The task's u is drawn from 0..1; without shuffling it is 1/2.
        """
        places = []
        for samples in self._of_task:
            shift = torch.rand(1, generator=order) if self.shuffle else 0.5
            places.append((torch.arange(len(samples)) + shift) / len(samples))
        every = torch.cat([self._shuffled(samples, order) for samples in self._of_task])
        every = every[torch.cat(places).argsort(stable=True)]
        return every.tensor_split(self._batches(len(every)))

    def _visits(self) -> list[list[tuple[int, int]]]:
        """Per batch of an epoch: its tasks, each with the number of that task's own batch."""
        per_task = self._batches_per_task
        if self.order == "blocked":
            visits = [[(task, i)] for task, count in enumerate(per_task) for i in range(count)]
        else:
            visits = [
                [(task, i) for task, count in enumerate(per_task) if i < count]
                for i in range(max(per_task))
            ]
        if self.order == "interleaved":
            visits = [[visit] for together in visits for visit in together]
        return visits[: self._max_rounds]

    def _batches(self, samples: int) -> int:
        return -(-samples // self.batch_size)

    def _shuffled(self, samples: Tensor, order: torch.Generator) -> Tensor:
        if not self.shuffle:
            return samples
        return samples[torch.randperm(len(samples), generator=order)]

    def _by_task(self, samples: Tensor) -> Tensor:
        return samples[torch.argsort(self._ids[samples], stable=True)]


def _checked_ids(
    inputs: Any, targets: Tensor, task_ids: Tensor, sizes: Tensor | None = None
) -> Tensor:
    parts = {"inputs": inputs}
    if isinstance(inputs, Mapping):
        parts = {f"inputs[{name!r}]": value for name, value in inputs.items()}
    for name, value in parts.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"RoundLoader: {name} must be a tensor, got {type(value).__name__}; {_OWN_DATA}"
            )
    if sizes is not None:
        parts["sizes"] = sizes
    for name, value in {**parts, "targets": targets, "task_ids": task_ids}.items():
        check_tensor("RoundLoader", name, value)
    if task_ids.dtype != torch.int64 or task_ids.dim() != 1:
        got = f"{task_ids.dtype} {list(task_ids.shape)}"
        hint = "; task_ids.long()" if task_ids.dim() == 1 else ""
        raise ValueError(f"RoundLoader: task_ids must be int64 [N], got {got}{hint}")
    for name, value in parts.items():
        if not len(value) == len(targets) == len(task_ids):
            raise ValueError(
                f"RoundLoader: {name}, targets and task_ids must have the same length, got "
                f"{len(value)}, {len(targets)} and {len(task_ids)}"
            )
        if value.device != targets.device:
            raise ValueError(
                f"RoundLoader: {name} and targets must be on one device, got {value.device} "
                f"and {targets.device}"
            )
    if sizes is not None and not bool(((sizes >= 0) & sizes.isfinite()).all()):
        raise ValueError("RoundLoader: sizes must be finite numbers >= 0, got others among them")
    ids = task_ids.cpu()
    if len(ids) == 0 or int(ids.max()) < 0:
        raise ValueError("RoundLoader: task_ids leave no sample to draw from")
    if int(ids.min()) < -1:
        raise ValueError(f"RoundLoader: task_ids must be >= -1, got {int(ids.min())}")
    return ids


def _checked_number(ids: Tensor, given: int | None) -> int:
    """The number of tasks; without one given every task must have samples."""
    found = int(ids.max()) + 1
    if given is not None:
        given = check_count("RoundLoader", "num_tasks", given)
        if given < found:
            raise ValueError(
                f"RoundLoader: num_tasks must be above all task_ids, got {given} and task "
                f"{found - 1}"
            )
        return given
    empty = (torch.bincount(ids[ids >= 0], minlength=found) == 0).nonzero()[:, 0].tolist()
    if empty:
        raise ValueError(
            f"RoundLoader: task_ids must number the tasks 0..T-1, but task {empty[0]} of {found} "
            "has no samples; number them by torch.unique(task_ids, return_inverse=True)[1], or "
            "give num_tasks= if tasks may have none"
        )
    return found
