"""How good a model is at each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import dtype_and_shape
from metalora.meta.data import Batch, Rounds, check_rounds
from metalora.meta.distribution import Distribution, active_distribution
from metalora.meta.steps import Forward, call_model
from metalora.nn import tasks

Metric = Callable[[Any, Batch], Tensor]
"""``metric(outputs, batch)`` → a number for each sample, [B]."""


@dataclass(frozen=True)
class Evaluation:
    """A metric's mean over the samples of each task, and the mean of these over tasks.

    Samples count by their sizes, where the loader has these. A task without samples has nan, and no
    part in the mean, which is nan if there is no other.
    """

    per_task: tuple[float, ...]
    mean: float


def accuracy(outputs: Tensor, batch: Batch) -> Tensor:
    """1 for each sample whose largest logit is its target's, else 0.

    Raises:
        ValueError: if ``outputs`` are no logits [B, classes], or targets no class numbers [B].
    """
    targets = batch.targets
    if not _are_logits(outputs) or targets.is_floating_point() or targets.dim() != 1:
        got = type(outputs).__name__
        if isinstance(outputs, Tensor):
            got = dtype_and_shape(outputs)
        raise ValueError(
            "accuracy: outputs must be logits [B, classes] and targets class numbers [B], got "
            f"{got} and {dtype_and_shape(targets)}; measure something else by a function, "
            "validation=lambda model: -evaluate(model, loader, metric).mean, with metric(outputs, "
            "batch) a number for each sample"
        )
    return (outputs.argmax(-1) == batch.targets).to(torch.float64)


def _are_logits(outputs: Any) -> bool:
    return isinstance(outputs, Tensor) and outputs.dim() == 2 and outputs.shape[1] > 1


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Within, all modules of ``model`` are in evaluation mode and no gradients are recorded."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def evaluate(
    model: nn.Module,
    loader: Rounds,
    metric: Metric = accuracy,
    *,
    forward: Forward = call_model,
) -> Evaluation:
    """Runs ``model`` in evaluation mode over one epoch of ``loader``.

    Inside a training on several processes, such as in its validation, each process runs its part
    of the samples, and all return the same.

    Args:
        model: plain or adapted; its mode is as before afterwards.
        loader: the samples.
        metric: what to average.
        forward: how the model is called.

    Raises:
        TypeError: if ``loader`` is none for tasks, such as a ``DataLoader``.
        ValueError: if ``metric`` does not return a value per sample, or each process has tasks of
            its own, and ``loader`` has others.
    """
    check_rounds("evaluate", loader, "loader")
    distribution = active_distribution() or Distribution(None, ())
    if distribution.by_task and loader.num_tasks != distribution.num_tasks:
        raise ValueError(
            f"evaluate: loader must have the {distribution.num_tasks} tasks of the training, which "
            f"are spread over processes, got {loader.num_tasks}"
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    zeros = torch.zeros(loader.num_tasks, dtype=torch.float64, device=device)
    sums = counts = zeros
    parts = (distribution.part(whole) for whole in loader)
    with evaluation_mode(model):
        for batch in (one for part in parts if len(part.task_ids) for one in part.passes()):
            with tasks(batch.task_ids, counts=batch.counts, lengths=batch.lengths):
                values = metric(forward(model, batch.inputs), batch)
            if not isinstance(values, Tensor) or values.shape != batch.task_ids.shape:
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise ValueError(
                    "evaluate: metric must return one value per sample, "
                    f"[{len(batch.task_ids)}], got {got}"
                )
            values = values.to(zeros)
            ids = distribution.global_ids(batch.task_ids).to(device, non_blocking=True)
            sizes = torch.ones_like(values) if batch.sizes is None else batch.sizes.to(values)
            sums = sums + zeros.index_add(0, ids, values * sizes)
            counts = counts + zeros.index_add(0, ids, sizes)
    if distribution.world_size > 1:
        sums, counts = distribution.total(torch.stack([sums, counts]))
    per_task = (sums / counts).tolist()
    present = [mean for mean, count in zip(per_task, counts.tolist(), strict=True) if count]
    return Evaluation(tuple(per_task), mean_of(present))


def mean_of(values: Sequence[float]) -> float:
    """Their mean; nan if there are none."""
    return sum(values) / len(values) if values else math.nan
