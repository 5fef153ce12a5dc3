"""How good a model is at each task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metalora.meta.data import Batch, Rounds
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
    """1 for each sample whose largest logit is its target's, else 0."""
    return (outputs.argmax(-1) == batch.targets).to(torch.float64)


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

    Args:
        model: plain or adapted; its mode is as before afterwards.
        loader: the samples.
        metric: what to average.
        forward: how the model is called.

    Inside a training on several processes, such as in its validation, each process runs its part
    of the samples, and all return the same.

    Raises:
        ValueError: if each process has tasks of its own, and ``loader`` has others.
    """
    distribution = active_distribution() or Distribution(None, ())
    if distribution.by_task and loader.num_tasks != distribution.num_tasks:
        raise ValueError(
            f"evaluate: loader must have the {distribution.num_tasks} tasks of the training, which "
            f"are spread over processes, got {loader.num_tasks}"
        )
    sums = counts = torch.zeros(())
    parts = (distribution.part(whole) for whole in loader)
    with evaluation_mode(model):
        for batch in (one for part in parts if len(part.task_ids) for one in part.passes()):
            with tasks(batch.task_ids, counts=batch.counts, lengths=batch.lengths):
                values = metric(forward(model, batch.inputs), batch).double()
            zeros = values.new_zeros(loader.num_tasks)
            ids = distribution.global_ids(batch.task_ids).to(values.device, non_blocking=True)
            sizes = torch.ones_like(values) if batch.sizes is None else batch.sizes.to(values)
            sums = sums.to(values.device) + zeros.index_add(0, ids, values * sizes)
            counts = counts.to(values.device) + zeros.index_add(0, ids, sizes)
    if distribution.world_size > 1:
        device = next(model.parameters()).device
        both = torch.zeros(2, loader.num_tasks, dtype=torch.float64, device=device)
        sums, counts = distribution.total(both + torch.stack([sums, counts]).view(2, -1).to(device))
    per_task = (sums / counts).tolist()
    present = [mean for mean, count in zip(per_task, counts.tolist(), strict=True) if count]
    return Evaluation(tuple(per_task), mean_of(present))


def mean_of(values: Sequence[float]) -> float:
    """Their mean; nan if there are none."""
    return sum(values) / len(values) if values else math.nan
