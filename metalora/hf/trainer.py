"""What transformers.Trainer must be told."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from metalora.hf.collator import TaskRounds


class RoundsCallback(TrainerCallback):
    """Has the `TaskRounds` that a transformers.Trainer trains on draw each epoch's own rounds.

    Without it they are those of the first epoch again and again in several processes, and other
    ones after resuming inside an epoch: accelerate gives the number of the epoch to its sampler,
    and then not to the dataset.
    """

    def on_epoch_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Calls `TaskRounds.set_epoch`."""
        dataset = getattr(train_dataloader, "dataset", None)
        if isinstance(dataset, TaskRounds):
            dataset.set_epoch(int(state.epoch or 0))
