"""Batches that say which sample belongs to which task, for transformers.Trainer and accelerate."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from metalora._checks import check_count, short
from metalora.meta import RoundLoader

Feature = Mapping[str, Any]
_OWN_DATA = (
    "of a dataset of tuples make {'x': x, 'y': y, 'task_id': task} (docs/how-to/own-data.md)"
)
_NUMBER = "number the tasks, as in numbers = {name: i for i, name in enumerate(sorted(set(names)))}"


class TaskCollator:
    """A data collator that groups the samples of a batch by task.

    Besides the output of ``collate``, the batch holds the inputs of a model after
    `accept_task_ids`: ``task_ids``, int64 [B], and ``task_counts``, the number of samples of each
    task as plain numbers, which stay on the host, where the layers need them.

    With transformers.Trainer set ``remove_unused_columns=False``, which would remove the task.
    ``label_names=["labels", "task_ids"]`` gives ``compute_metrics`` the tasks too.

    Args:
        collate: makes a batch of features, such as ``transformers.DataCollatorWithPadding``.
        key: the field of a feature that holds its task, a number from 0.
        group: whether samples are sorted by task, those of one task in their order. If not, all
            keep their order, so that predictions match an unsorted dataset; each layer then sorts,
            and the first waits for a GPU. In several processes only rounds of `TaskRounds` are
            sorted: accelerate fills up the last batch of an evaluation with samples that it takes
            away again from the end.

    Raises:
        TypeError: if a feature is no mapping.
        ValueError: if a feature has no task, or one that is no number, or the batch is of several
            rounds of `TaskRounds`.
    """

    def __init__(
        self,
        collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
        *,
        key: str = "task_id",
        group: bool = True,
    ) -> None:
        self.collate, self.key, self.group = collate, key, group

    def __call__(self, features: Sequence[Feature] | Sequence[list[Feature]]) -> dict[str, Any]:
        """Features, or a single round of them, → a batch."""
        group = self.group and (isinstance(next(iter(features), None), list) or not _several())
        features = self._one_round(features)
        ids = [self._task(feature) for feature in features]
        if group:
            order = sorted(range(len(ids)), key=ids.__getitem__)
            features, ids = [features[i] for i in order], [ids[i] for i in order]
        samples = [{k: v for k, v in f.items() if k != self.key} for f in features]
        batch = {**self.collate(samples), "task_ids": torch.tensor(ids, dtype=torch.int64)}
        if group:
            batch["task_counts"] = tuple(torch.bincount(batch["task_ids"]).tolist())
        return batch

    def _one_round(self, features: Sequence[Any]) -> list[Feature]:
        rounds = [item for item in features if isinstance(item, list)]
        if not rounds:
            return list(features)
        if len(features) > 1:
            raise ValueError(
                f"TaskCollator: got {len(features)} rounds of TaskRounds, each a batch already; "
                "set per_device_train_batch_size=1, or the DataLoader's batch_size=1"
            )
        return list(rounds[0])

    def _task(self, feature: Feature) -> int:
        if not isinstance(feature, Mapping):
            raise TypeError(
                f"TaskCollator: features must be dictionaries with {self.key!r}, got "
                f"{type(feature).__name__}; {_OWN_DATA}"
            )
        if self.key not in feature:
            raise ValueError(
                f"TaskCollator: features must have {self.key!r}, got {sorted(feature)}; name it "
                "with key=, and with transformers.Trainer set remove_unused_columns=False"
            )
        given = feature[self.key]
        try:
            task = operator.index(given)
        except TypeError:
            raise ValueError(
                f"TaskCollator: {self.key!r} must be a number from 0, got {short(given)}; {_NUMBER}"
            ) from None
        if task < 0:
            raise ValueError(f"TaskCollator: {self.key!r} must be >= 0, got {task}")
        return task


def _several() -> bool:
    """Whether there are several processes; a DataLoader's workers know it by their environment."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return max(world, int(os.environ.get("WORLD_SIZE") or 1)) > 1


class TaskRounds(Dataset[list[Any]]):
    """A dataset whose items are whole rounds: up to ``batch_size`` samples of every task.

    Give it to transformers.Trainer with ``per_device_train_batch_size=1``, or to a DataLoader with
    ``batch_size=1``, and a `TaskCollator`. Rounds are those of `metalora.meta.RoundLoader`: an
    epoch gives every sample once, and tasks with fewer samples run out earlier. From then on
    `metalora.TaskOptimizer` leaves their adapters alone.

    `set_epoch` must be called before each epoch, as in a loop of one's own with accelerate or
    without; with Trainer, `RoundsCallback` does.

    Args:
        dataset: the samples, N of them.
        task_ids: the task of each, N numbers or int64 [N]; -1 leaves a sample out.
        batch_size: samples per task and round.
        seed: of the order.
        shuffle: whether the order changes with each epoch.
        max_rounds: end the epoch after so many rounds. With the number that the smallest task has,
            every task is in every round.

    Raises:
        ValueError: if lengths differ, a task has no samples or no number, or a number is outside
            its range.
    """

    def __init__(
        self,
        dataset: Any,
        task_ids: Sequence[int] | Tensor,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        max_rounds: int | None = None,
    ) -> None:
        try:
            ids = torch.as_tensor(task_ids)
        except (TypeError, ValueError):
            raise ValueError(
                f"TaskRounds: task_ids must be numbers from 0, got {short(task_ids)}; {_NUMBER}"
            ) from None
        if len(dataset) != len(ids):
            raise ValueError(
                f"TaskRounds: dataset and task_ids must have the same length, got {len(dataset)} "
                f"and {len(ids)}"
            )
        self.dataset = dataset
        numbers = torch.arange(len(ids))
        self._loader = RoundLoader(
            numbers,
            numbers,
            ids,
            batch_size=batch_size,
            seed=seed,
            shuffle=shuffle,
            max_rounds=max_rounds,
        )
        self.num_tasks = self._loader.num_tasks
        # Shared, for persistent workers of a DataLoader keep their copy of the rest.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._drawn = -1  # the epoch of these rounds
        self._rounds: list[list[int]] = []

    def set_epoch(self, epoch: int) -> None:
        """Chooses the rounds of this epoch, a pure function of (seed, epoch)."""
        self._epoch.fill_(check_count("TaskRounds.set_epoch", "epoch", epoch, minimum=0))

    def __len__(self) -> int:
        return len(self._loader)

    def __getitem__(self, number: int) -> list[Any]:
        """The samples of a round, sorted by task."""
        epoch = int(self._epoch)
        if epoch != self._drawn:
            self._loader.set_epoch(epoch)
            self._rounds, self._drawn = [batch.inputs.tolist() for batch in self._loader], epoch
        return [self.dataset[i] for i in self._rounds[number]]
