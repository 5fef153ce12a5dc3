"""A model that is called with ``task_ids``, as transformers.Trainer calls it with any input."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from metalora.adapters import adapted_layers
from metalora.adapters.state import check_adapted
from metalora.meta import Batch, cross_entropy, task_mean
from metalora.meta.steps import Loss
from metalora.nn import TaskBatch, tasks


def accept_task_ids(model: nn.Module, loss: Loss = cross_entropy) -> TaskIds:
    """Lets an adapted model be called with the ``task_ids`` and ``task_counts`` of `TaskCollator`.

    A call with them runs inside ``with metalora.tasks(...)``; without them the model is called as
    before. A model that takes them already loses its earlier `TaskIds`.

    Args:
        model: an adapted model, which gets hooks; how it is saved does not change.
        loss: ``loss(logits, batch)`` → the loss of each sample, [B], for `TaskIds.loss`.

    Raises:
        ValueError: if ``model`` is not adapted.
    """
    return TaskIds(model, loss)


class TaskIds:
    """What `accept_task_ids` returns: the objective of the model's latest call."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        layers = list(adapted_layers(check_adapted("accept_task_ids", model)).values())
        for hook in list(model._forward_pre_hooks.values()):
            earlier = getattr(hook, "__self__", None)
            if isinstance(earlier, TaskIds):
                earlier.remove()
        self._num_tasks, self._loss = layers[0].num_tasks, loss
        self._shifts = _shifts_labels(model)
        self._batch: TaskBatch | None = None
        self._scope = ExitStack()
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, always_call=True),
        ]

    def mean(self, losses: Tensor) -> Tensor:
        """The mean over tasks of each task's mean of ``losses`` [B] (paper, eq. 5).

        Raises:
            ValueError: if the latest call was without ``task_ids``, or of another size.
        """
        batch = self._latest()
        if losses.shape != batch.task_ids.shape:
            raise ValueError(
                "TaskIds.mean: losses must be those of the latest call's samples, "
                f"[{batch.size}], got {list(losses.shape)}"
            )
        return task_mean(losses, batch)

    def loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """The objective, as ``compute_loss_func`` of transformers.Trainer.

        Args:
            outputs: of the model, with ``logits``.
            labels: of its samples.
            num_items_in_batch: labels in all batches whose gradients are accumulated, counted as
                Trainer does, of causal models without the first of each sequence; each batch
                counts by its share of them.

        Raises:
            ValueError: if there are no labels, or the latest call was without ``task_ids``.
        """
        if labels is None:
            raise ValueError(
                "TaskIds.loss: the batch has no labels; give every sample of the dataset 'labels'"
            )
        batch = Batch(None, labels, self._latest().task_ids)
        value = self.mean(self._loss(outputs.logits, batch))
        if num_items_in_batch is None:
            return value
        counted = labels[..., 1:] if self._shifts else labels
        return value * counted.ne(-100).sum() / num_items_in_batch

    def remove(self) -> None:
        """Takes the hooks off the model."""
        self._scope.close()
        for handle in self._handles:
            handle.remove()

    def _latest(self) -> TaskBatch:
        if self._batch is None:
            raise ValueError(
                "TaskIds: the model's latest call was without task_ids; is TaskCollator the "
                "data_collator?"
            )
        return self._batch

    def _before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        self._scope.close()  # left open by an interrupt, behind which torch calls no hooks
        kwargs = dict(kwargs)
        ids, counts = kwargs.pop("task_ids", None), kwargs.pop("task_counts", None)
        self._batch = None
        if ids is None:
            return None
        if counts is not None and sum(counts) != len(ids):
            raise ValueError(
                f"accept_task_ids: task_counts must sum to the {len(ids)} task_ids, got "
                f"{list(counts)}; something split the batch without them: use "
                "DistributedDataParallel instead of nn.DataParallel, and with "
                "dispatch_batches=True pass TaskCollator(group=False)"
            )
        self._batch = TaskBatch(ids, self._num_tasks, counts=counts)
        self._scope.enter_context(tasks(self._batch))
        return args, kwargs

    def _after(self, model: nn.Module, args: Any, outputs: Any) -> None:
        self._scope.close()


def _shifts_labels(model: Any) -> bool:
    """Whether Trainer counts the labels of this model from the second of each sequence on."""
    kind = getattr(model, "loss_type", None)
    if kind is None or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    return LOSS_MAPPING.get(kind) is ForCausalLMLoss
