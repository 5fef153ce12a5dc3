"""Trainings on several processes: which samples and tasks each has, and what they exchange."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from metalora._checks import check_choice, check_count, first_line, first_of
from metalora.meta.data import Batch
from metalora.meta.identity import differences

PARALLEL = ("data", "tasks")


class ProcessGroupError(RuntimeError):
    """Processes that train together differ, or one has ended or does not answer."""


class Distribution:
    """How a training is spread over the processes of torch.distributed.

    Every process goes through the same batches, and takes its part of each:

    - ``"data"``: all tasks, and of each task in a batch a part of its samples.
    - ``"tasks"``: some tasks, with all their samples. Only these tasks' adapters and heads, and
      their state in the optimiser, are in this process; only the gradients of the shared weights
      are exchanged.

    The objective is that of one process: the weights of the samples (see `Batch`) are those of the
    whole batch, and gradients are summed over processes, in one exchange per step.

    Tasks go to processes by their number of samples: the largest that is left to the process with
    the fewest. A process that gets none holds task 0 as a spare, which is never trained.

    Args:
        parallel: "data" or "tasks"; None: everything stays in this process.
        samples_per_task: how many samples each of the T tasks has.
        group: the processes; None means all. Without an initialised process group it is this one.

    Attributes:
        rank, world_size: the number of this process, and how many there are.
        tasks: the tasks of this process, ascending.
        held: those that its model holds: ``tasks``, or a spare.

    Raises:
        ValueError: if ``parallel`` is unknown, a number is negative, or torchrun started several
            processes and there is no process group.
    """

    def __init__(
        self,
        parallel: str | None,
        samples_per_task: Sequence[int],
        *,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if parallel is not None:
            check_choice("Distribution", "parallel", parallel, PARALLEL)
        self.parallel, self.group = parallel, group
        self.rank, self.world_size = 0, 1
        if parallel is not None and dist.is_available() and dist.is_initialized():
            self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)
        elif parallel is not None and (started := os.environ.get("WORLD_SIZE", "1")) != "1":
            raise ValueError(
                f"Distribution: {started} processes were started, but they do not know each other; "
                "call torch.distributed.init_process_group() first"
            )
        for count in samples_per_task:
            check_count("Distribution", "samples_per_task", count, minimum=0)
        self.num_tasks = len(samples_per_task)
        self.by_task = parallel == "tasks"
        self.tasks_of = (
            _spread(samples_per_task, self.world_size)
            if self.by_task
            else [list(range(self.num_tasks))] * self.world_size
        )
        self.tasks = self.tasks_of[self.rank]
        self.held = self.tasks or [0]
        local = torch.full((self.num_tasks,), -1, dtype=torch.int64)
        local[self.tasks] = torch.arange(len(self.tasks))
        self._local = {local.device: local}  # the number of each task here, by device

    def part(self, batch: Batch) -> Batch:
        """The samples of ``batch`` that are this process's, which may be none.

        Their weights are those in the whole batch: the batch's own, or else those of its
        ``weighting``. Task parallel, tasks are numbered as the model here holds them.

        Example:
            ``(losses * part.weights).sum().backward()``, then `sum_gradients`

        Raises:
            ValueError: if the samples are packed already.
        """
        if self.parallel is None:
            return batch
        batch = replace(batch, weights=batch.loss_weights())
        if not self.by_task:
            return self._strided(batch)
        if batch.counts is not None:
            return self._ranges(batch, batch.counts)
        ids = batch.task_ids
        if ids.device not in self._local:
            self._local[ids.device] = next(iter(self._local.values())).to(ids.device)
        local = self._local[ids.device][ids]
        rows = (local >= 0).nonzero()[:, 0]
        part = replace(batch, places=torch.arange(len(ids))).take(rows)
        return replace(part, task_ids=local[rows])

    def _ranges(self, batch: Batch, counts: Sequence[int]) -> Batch:
        """The samples of this process's tasks, sorted by task; nothing waits for a device."""
        starts = [0, *accumulate(counts)]
        tasks = [task for task in self.tasks if task < len(counts)]
        ranges = [torch.arange(starts[task], starts[task + 1]) for task in tasks]
        places = torch.cat([torch.arange(0), *ranges])
        own = tuple(counts[task] for task in tasks) + (0,) * (len(self.tasks) - len(tasks))
        local = torch.arange(len(own)).repeat_interleave(torch.tensor(own, dtype=torch.int64))
        device = batch.task_ids.device
        part = replace(batch, places=None).take(places.to(device, non_blocking=True), own)
        return replace(part, task_ids=local.to(device, non_blocking=True), places=places)

    def _strided(self, batch: Batch) -> Batch:
        """Every world_size-th sample of the batch sorted by task."""
        every = slice(self.rank, None, self.world_size)
        whole = replace(batch, places=torch.arange(len(batch.task_ids)))
        if batch.counts is None:
            return whole.take(batch.task_ids.argsort(stable=True)[every])
        ends = torch.tensor([0, *batch.counts]).cumsum(0)
        before = (ends + self.world_size - 1 - self.rank) // self.world_size  # of these, here
        return whole.take(every, tuple(before.diff().tolist()))

    def global_ids(self, task_ids: Tensor) -> Tensor:
        """The numbers among all T tasks of the task ids of `part`, int64 [B]."""
        if not self.by_task:
            return task_ids
        return torch.tensor(self.held, device=task_ids.device)[task_ids]

    def total(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all processes, in each of them, as a new tensor."""
        values = values.detach().clone()
        if self.world_size > 1:
            self._exchange(dist.all_reduce, values, group=self.group)
        return values

    def sum_gradients(self, parameters: Sequence[Tensor], loss: Tensor) -> Tensor:
        """Sums the gradients of ``parameters``, and the loss, over all processes, in one exchange.

        A parameter that has a gradient in no process still has none. Gradients of several dtypes
        take an exchange for each.

        Args:
            parameters: the same ones in the same order in all processes: task parallel, the
                shared ones.
            loss: a scalar of this process's part, of the same dtype in all processes.

        Returns:
            The loss of the whole batch.
        """
        if self.world_size == 1:
            return loss
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in parameters:
            by_dtype.setdefault(parameter.dtype, []).append(parameter)
        precise = loss.dtype
        has = torch.tensor([p.grad is not None for p in parameters], dtype=precise)
        tail = torch.cat([loss.detach().reshape(1), has.to(loss.device)])
        found: dict[Tensor, Tensor] = {}
        for dtype in sorted({*by_dtype, precise}, key=str):
            own = by_dtype.get(dtype, [])
            parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in own]
            flat = torch.cat([*parts, *([tail] if dtype == precise else [])])
            self._exchange(dist.all_reduce, flat, group=self.group)
            pieces = flat.split([p.numel() for p in own] + [len(tail)] * (dtype == precise))
            found.update(zip(own, pieces, strict=False))
            tail = pieces[-1] if dtype == precise else tail
        # What this process has, one has; only of the others the exchanged flags must be read.
        missing = any(p.grad is None for p in parameters)
        flags = tail[1:].tolist() if missing else [True] * len(parameters)
        for parameter, anywhere in zip(parameters, flags, strict=True):
            whole = found[parameter].view_as(parameter)
            if not parameter.is_contiguous():
                # Fused optimisers step by the order in memory, as of channels_last.
                whole = torch.empty_like(parameter).copy_(whole)
            parameter.grad = whole if anywhere else None
        return tail[0].clone()

    def clip_gradients(
        self, shared: Sequence[Tensor], own: Sequence[Tensor], max_norm: float
    ) -> None:
        """Clips the norm of all gradients together, those of other processes' tasks included.

        Args:
            shared: parameters whose gradients are the same in all processes.
            own: adapters and heads of the tasks.
            max_norm: the largest norm.
        """
        if not self.by_task or self.world_size == 1:
            nn.utils.clip_grad_norm_([*shared, *own], max_norm)
            return
        norms = []
        for part in (shared, own):
            grads = [p.grad for p in part if p.grad is not None]
            device = (*shared, *own)[0].device
            norms.append(nn.utils.get_total_norm(grads).double().to(device).square())
        total = (norms[0] + self.total(norms[1])).sqrt().to((*shared, *own)[0].dtype)
        nn.utils.clip_grads_with_norm_([*shared, *own], max_norm, total)

    def broadcast(self, numbers: Sequence[float], device: torch.device) -> list[float]:
        """Process 0's numbers, in every process; all must pass equally many."""
        if self.world_size == 1:
            return [float(number) for number in numbers]
        values = torch.tensor(numbers, dtype=torch.float64, device=device)
        values = values if self.rank == 0 else torch.zeros_like(values)
        return list(self.total(values).tolist())

    def gather_text(self, text: str, device: torch.device) -> list[str]:
        """The text of every process."""
        if self.world_size == 1:
            return [text]
        data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8).to(device)
        sizes = self._gather(torch.tensor([len(data)], device=device))
        longest = max(int(size) for size in sizes)
        padded = data.new_full((longest,), ord(" "))
        padded[: len(data)] = data
        return [bytes(found.tolist()).decode().rstrip() for found in self._gather(padded)]

    def _gather(self, values: Tensor) -> list[Tensor]:
        found = [torch.empty_like(values) for _ in range(self.world_size)]
        self._exchange(dist.all_gather, found, values, group=self.group)
        return found

    def check_same(self, described: Mapping[str, Any], device: torch.device) -> None:
        """Refuses processes that were given other things than process 0.

        Args:
            described: what must be equal, in values that JSON can hold.
            device: where this process exchanges tensors.

        Raises:
            ProcessGroupError: in every process, if one differs; names the first, and what differs.
        """
        texts = self.gather_text(json.dumps(described), device)
        first = json.loads(texts[0])
        for rank, text in enumerate(texts):
            found = list(differences("", first, json.loads(text), here=f"in process {rank}"))
            if found:
                raise ProcessGroupError(
                    f"train: all processes must train the same, but process {rank} of "
                    f"{self.world_size} differs from process 0: {first_of(found, 3)}"
                )

    def check_model(self, model: nn.Module) -> None:
        """Refuses models that this would train otherwise than one process does.

        Raises:
            ValueError: if gradients are exchanged already; with several processes also for a batch
                normalisation, or a layer other than nn.Dropout that draws random numbers.
        """
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError(
                "train: the model must not be wrapped in DistributedDataParallel, for the training "
                "itself sums gradients over processes; pass the model itself"
            )
        for name, module in model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and self.world_size > 1:
                raise ValueError(
                    f"train: {name!r} normalises over the samples of a batch, of which each "
                    "process has a part; use nn.GroupNorm or nn.LayerNorm, or a single process"
                )
            if self.world_size > 1 and _draws_by_batch(module):
                raise ValueError(
                    f"train: {name!r}, of {type(module).__name__}, would draw other random numbers "
                    "in several processes than in one; use nn.Dropout, or a single process"
                )

    def _exchange(self, operation: Callable[..., Any], *args: Any, **options: Any) -> None:
        try:
            operation(*args, **options)
        except RuntimeError as error:
            raise ProcessGroupError(
                f"train: process {self.rank} of {self.world_size} lost the others, of which one "
                f"has ended or did not answer in time ({first_line(error)}); start all again, "
                "which goes on from the last checkpoint"
            ) from error

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, `metalora.meta.evaluate` runs each process's part and adds up the results."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)


def _draws_by_batch(module: nn.Module) -> bool:
    """Whether a layer draws random numbers that `metalora.nn.sample_dropout` does not make."""
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return not isinstance(module, nn.Dropout) and module.p > 0
    return isinstance(module, nn.RReLU)


_active: ContextVar[Distribution | None] = ContextVar("metalora.distribution", default=None)


def active_distribution() -> Distribution | None:
    """The distribution of the training around the caller, None outside."""
    return _active.get()


def _spread(samples_per_task: Sequence[int], processes: int) -> list[list[int]]:
    """Per process its tasks: the largest that is left goes to the process with the fewest samples.

    Of equal ones the first is taken, so that all processes find the same.
    """
    tasks: list[list[int]] = [[] for _ in range(processes)]
    samples = [0] * processes
    for task in sorted(range(len(samples_per_task)), key=lambda t: (-samples_per_task[t], t)):
        fewest = min(range(processes), key=lambda rank: (samples[rank], len(tasks[rank]), rank))
        tasks[fewest].append(task)
        samples[fewest] += samples_per_task[task]
    return [sorted(part) for part in tasks]
