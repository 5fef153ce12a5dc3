"""The mean over tasks of each task's mean over samples."""

from __future__ import annotations

import torch
from torch import Tensor

from metalora._checks import SHORT
from metalora.nn import TaskBatch


def task_mean(
    losses: Tensor, task_ids: Tensor | TaskBatch, *, sizes: Tensor | None = None
) -> Tensor:
    """The mean, over the tasks present, of each task's mean over its samples (paper, eq. 5).

    With S the tasks present and n_t the number of samples of task t:
    ``1/|S| Σ_{t in S} 1/n_t Σ_i losses[i]`` over the samples i of t. The plain mean over samples
    would weigh tasks by their samples instead. Nothing waits for a GPU.

    Samples of unequal length can count by their ``sizes``: where ``losses`` are means over the
    tokens of each sample and ``sizes`` the numbers of these, a task's mean is that over its tokens.

    Example:
        ``loss = metalora.task_mean(F.cross_entropy(logits, targets, reduction="none"), task_ids)``

    Args:
        losses: [B], the loss of each sample, of any floating-point dtype.
        task_ids: int64 [B], the task of each sample, in any order, on the CPU or where the losses
            are; or a `TaskBatch`.
        sizes: [B], what each sample counts in its task's mean, of any dtype, on the CPU or where
            the losses are; None: all the same. A task whose sizes are all 0 is not present.

    Returns:
        A scalar, in float32 for losses in half precision. It is 0 for an empty batch, which adds
        nothing to any gradient.

    Raises:
        TypeError: if ``losses`` is no tensor of a floating-point dtype, or ``task_ids`` is neither
            an int64 tensor nor a `TaskBatch`.
        ValueError: if shapes or devices do not fit, or an id is negative, which is not seen on a
            GPU.
    """
    ids = task_ids.task_ids if isinstance(task_ids, TaskBatch) else task_ids
    _check(losses, ids)
    if sizes is not None and sizes.shape != ids.shape:
        raise ValueError(
            f"task_mean: sizes must be one per sample, [B={len(ids)}], got {list(sizes.shape)}"
        )
    order = task_ids.sorted_ids if isinstance(task_ids, TaskBatch) else None
    return weighted_mean(losses, sample_weights(ids, order, sizes))


def sample_weights(
    task_ids: Tensor, sorted_ids: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    """float64 [B]: size / (number of tasks present · sum of the own task's sizes), as in eq. 5.

    They are on the device of the ids, or of the sizes where the ids are on the CPU.

    Args:
        task_ids: int64 [B].
        sorted_ids: the same in ascending order, where they are at hand.
        sizes: [B], what each sample counts in its task's mean; None: 1 each. A task whose sizes
            are all 0 is not present.
    """
    if sizes is not None and task_ids.device.type == "cpu":
        # To the sizes, as the other way the host would wait for a GPU.
        task_ids = task_ids.to(sizes.device, non_blocking=True)
        sorted_ids = None if sorted_ids is None else sorted_ids.to(sizes.device, non_blocking=True)
    if sorted_ids is None:
        sorted_ids = task_ids.sort().values
    first = torch.searchsorted(sorted_ids, task_ids)
    if sizes is None:
        present = 1 + (sorted_ids[1:] != sorted_ids[:-1]).sum()
        counts = torch.searchsorted(sorted_ids, task_ids, right=True) - first
        return 1 / (counts * present).double()
    # Each task has a place of its own, that of its first sample among the sorted ones.
    sizes = sizes.to(task_ids.device).double()
    totals = torch.zeros_like(sizes).index_add(0, first, sizes)
    weighed = totals[first] * (totals > 0).sum()
    return sizes / weighed.clamp(min=torch.finfo(torch.float64).tiny)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """The sum of ``losses`` [B] times ``weights`` [B], in float32 or better."""
    if losses.dtype in SHORT:
        losses = losses.float()
    # A copy from the CPU need not be waited for; one to it must be, or it is read half-written.
    weights = weights.to(losses, non_blocking=weights.device.type == "cpu")
    return (losses * weights).sum()


def _check(losses: Tensor, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"task_mean: task_ids must be int64 [B] or a TaskBatch, got {got}")
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        got = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"task_mean: losses must be a floating-point tensor [B], got {got}")
    if ids.dim() != 1:
        raise ValueError(f"task_mean: task_ids must be [B], got {list(ids.shape)}")
    if losses.dim() == 0:
        raise ValueError(
            f"task_mean: losses must be one per sample, [B={len(ids)}], got a scalar; pass "
            "reduction='none' to the loss"
        )
    if losses.shape != ids.shape:
        raise ValueError(
            f"task_mean: losses must be one per sample, [B={len(ids)}], got {list(losses.shape)}"
        )
    known = ids.device.type == "cpu" and len(ids) > 0 and not torch.compiler.is_compiling()
    if known and ids.min() < 0:
        raise ValueError(
            f"task_mean: task_ids must not be negative, got {ids.min().item()}; leave samples out "
            "of losses and task_ids alike"
        )
    if ids.device not in (losses.device, torch.device("cpu")):
        raise ValueError(
            f"task_mean: task_ids must be on {losses.device} as losses are, or on the CPU, "
            f"got {ids.device}"
        )
