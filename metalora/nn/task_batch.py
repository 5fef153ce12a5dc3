"""Which task each sample of a batch belongs to, in the form the layers need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from metalora._checks import check_count
from metalora._transforms import faking, transformed

_PARTS = "_metalora_parts"


def with_parts(task_ids: Tensor, parts: int) -> Tensor:
    """Notes on the ids that each sample has this many rows, sample by sample; the same tensor."""
    setattr(task_ids, _PARTS, parts)
    return task_ids


class TaskBatch:
    """The tasks of a batch's samples, in the form the layers need.

    Built once per batch and shared by all layers. How many rows a task has must be known on the
    host: from ``counts``, or from ``task_ids`` on the CPU. From ids on a GPU they are read back by
    the first layer, the only time that anything here waits for a device.

    The batch keeps a copy of the ids, so the caller's tensor may be written to afterwards. It may
    be made and used under `torch.inference_mode` and still serve a training later.

    Args:
        task_ids: int64 [B], the task of each sample, in any order. An int is the task of all
            samples, however many there are; to the batch they are then a single one.
        num_tasks: number of tasks T; ids are then checked at once, else by the first layer.
        counts: the number of samples of each task, at most T numbers, for ids that ascend; they
            are checked against ids on the CPU and trusted elsewhere. A sorted batch costs its
            layers no permutation; for one that is not, see `metalora.call_sorted`.
        lengths: the number of rows of each sample, B numbers, where samples of unequal length are
            packed: layers then also take x [1, sum(lengths), in] or [sum(lengths), in], one sample
            behind the other. The ids must ascend, and be on the CPU or come with ``counts``.

    Raises:
        TypeError: if ``task_ids`` is neither an int64 tensor nor an int.
        ValueError: if it is not one-dimensional, an id is outside 0..T-1, or ``counts`` or
            ``lengths`` do not fit the ids.
        RuntimeError: under FakeTensorMode, which has no ids to read. Layers run in it with a batch
            made before and on native routes, if it allows inputs that are not fake.
    """

    @torch.inference_mode(False)  # see `kept_tensors`
    def __init__(
        self,
        task_ids: Tensor | int,
        num_tasks: int | None = None,
        *,
        counts: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
    ) -> None:
        if faking():
            raise RuntimeError(
                "tasks: under FakeTensorMode the ids have no values to read; make the TaskBatch "
                "before entering FakeTensorMode(allow_non_fake_inputs=True)"
            )
        if isinstance(task_ids, Integral) and not isinstance(task_ids, bool):
            task_ids = torch.tensor([int(task_ids)])  # numpy's integers too
        if not isinstance(task_ids, Tensor):
            got = type(task_ids).__name__
            raise TypeError(
                f"tasks: task_ids must be an int64 tensor [B], or an int for samples of one task, "
                f"got {got}"
            )
        if task_ids.dtype != torch.int64:
            raise TypeError(
                f"tasks: task_ids must be int64 [B], got {task_ids.dtype}; use task_ids.long()"
            )
        if task_ids.dim() != 1:
            raise ValueError(f"tasks: task_ids must be [B], got shape {list(task_ids.shape)}")
        parts = None if torch.compiler.is_compiling() else getattr(task_ids, _PARTS, None)
        task_ids = task_ids.clone()
        self.task_ids = task_ids
        on_host = task_ids.device.type == "cpu"
        self._starts: Tensor | None = None  # int64 [number of counts + 1] on the host
        if counts is not None:
            self._starts = _starts(counts, task_ids)
        is_sorted = counts is not None
        if on_host and not is_sorted:
            is_sorted = bool((task_ids[1:] >= task_ids[:-1]).all())
        self.order: Tensor | None = None  # int64 [B]; order[i] = sample that comes i-th
        self.inverse: Tensor | None = None  # int64 [B]; inverse[order] = 0..B-1
        self.sorted_ids = task_ids
        if not is_sorted:
            self.sorted_ids, self.order = torch.sort(task_ids, stable=True)
            self.inverse = torch.argsort(self.order)
        self._packed: Tensor | None = None  # [number of rows of a packed x, 0]
        if lengths is not None:
            known = is_sorted and (on_host or counts is not None)
            self._ends = _ends(lengths, self.size, known)  # int64 [B + 1] on the host
            self._packed = torch.empty(int(self._ends[-1]), 0)
        self._range: tuple[int, int] | None = None
        if on_host and self.size:
            self._range = int(self.sorted_ids[0]), int(self.sorted_ids[-1])
        self._known: dict[int, None] = {}
        self._pointers: dict[tuple[int, int | None], Tensor] = {}
        self._present: dict[int, frozenset[int]] = {}
        self._moved: dict[torch.device, tuple[Tensor, Tensor]] = {}
        self._ids: dict[torch.device, Tensor] = {}
        # In how many parts the rows of a sample are known to come, sample by sample.
        self.parts: set[int] = set() if parts is None else {parts}
        self.order_noted: set[int] = set()  # see `TaskLayer`
        if num_tasks is not None:
            self.check_range(check_count("tasks", "num_tasks", num_tasks))

    @property
    def size(self) -> int:
        """Number of samples B."""
        return self.task_ids.shape[0]  # kept as an int, it would be compiled in as a constant

    @property
    def packed_rows(self) -> int | None:
        """Number of rows of a packed x, None without ``lengths``; see `size`."""
        return None if self._packed is None else self._packed.shape[0]

    def packs(self, x: Tensor) -> bool:
        """Whether x is [1, sum(lengths), in] or [sum(lengths), in], its samples packed."""
        if self.packed_rows is None or x.dim() > 3:
            return False
        return x.shape[-2] == self.packed_rows and (x.dim() == 2 or x.shape[0] == 1)

    def ids_on(self, device: torch.device) -> Tensor:
        """``task_ids`` on ``device``, copied there once: a CUDA graph then captures no copy."""
        if self.task_ids.device == device:
            return self.task_ids
        if torch.compiler.is_compiling() or transformed():
            return self.task_ids.to(device, non_blocking=True)
        if device not in self._ids:
            with kept_tensors():
                self._ids[device] = self.task_ids.to(device, non_blocking=True)
        return self._ids[device]

    def packed_ids(self, device: torch.device) -> Tensor:
        """int64 [sum(lengths)] on ``device``: the task of each row of a packed x."""
        lengths = self._ends.diff().to(device, non_blocking=True)
        ids = self.ids_on(device)
        return torch.repeat_interleave(ids, lengths, output_size=self.packed_rows)

    def check_range(self, num_tasks: int) -> None:
        """Raises ValueError unless all ids are in 0..num_tasks-1 (on a GPU: a device assertion)."""
        if num_tasks in self._known or self.size == 0:
            return
        if self._range is not None:
            low, high = self._range
            if low < 0 or high >= num_tasks:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"tasks: task_ids must be in 0..{num_tasks - 1}, as there are {num_tasks} "
                    f"tasks, got {wrong}"
                )
        else:
            inside = (self.sorted_ids[0] >= 0) & (self.sorted_ids[-1] < num_tasks)
            torch._assert_async(inside, f"tasks: task_ids must be in 0..{num_tasks - 1}")
        self._known[num_tasks] = None

    def of_one_task(self) -> bool:
        """Whether the host knows that all samples are of the same task."""
        if self._range is not None:
            return self._range[0] == self._range[1]
        return self._starts is not None and int((self._starts.diff() > 0).sum()) <= 1

    def counts_known(self, num_tasks: int) -> bool:
        """Whether `task_ptr` waits for no device."""
        on_host = self._starts is not None or self.task_ids.device.type == "cpu"
        return on_host or (num_tasks, 1) in self._pointers

    def task_ptr(self, num_tasks: int, rows_per_sample: int | None) -> Tensor:
        """int64 [T + 1] on the CPU: sorted rows ``task_ptr[t]:task_ptr[t + 1]`` are task t's.

        Args:
            num_tasks: number of tasks T.
            rows_per_sample: None for packed samples, whose rows differ in number.
        """
        if torch.compiler.is_compiling():  # a cache would be guarded on, and recompiled for
            return self._scaled(self._make_ptr(num_tasks), rows_per_sample)
        self.check_range(num_tasks)
        key = (num_tasks, rows_per_sample)
        if key not in self._pointers:
            self._keep_ptr(num_tasks, rows_per_sample)
        return self._pointers[key]

    def _keep_ptr(self, num_tasks: int, rows_per_sample: int | None) -> None:
        with kept_tensors():
            one = (num_tasks, 1)
            if one not in self._pointers:
                self._pointers[one] = self._make_ptr(num_tasks)
            if rows_per_sample != 1:
                ptr = self._scaled(self._pointers[one], rows_per_sample)
                self._pointers[num_tasks, rows_per_sample] = ptr

    def present(self, num_tasks: int) -> frozenset[int]:
        """The tasks that have samples here, known on the host as soon as `task_ptr` is."""
        if num_tasks not in self._present:
            counts = self.task_ptr(num_tasks, 1).diff().tolist()
            self._present[num_tasks] = frozenset(t for t, count in enumerate(counts) if count)
        return self._present[num_tasks]

    def _scaled(self, ptr: Tensor, rows_per_sample: int | None) -> Tensor:
        return self._ends[ptr] if rows_per_sample is None else ptr * rows_per_sample

    def _make_ptr(self, num_tasks: int) -> Tensor:
        if self._starts is not None:
            counts = self._starts.shape[0] - 1
            if counts > num_tasks:
                raise ValueError(
                    f"tasks: counts must be at most {num_tasks} numbers, as there are {num_tasks} "
                    f"tasks, got {counts}"
                )
            # Not concatenated: torch.compile would compile again for every number of counts.
            return self._starts[torch.arange(num_tasks + 1).clamp_(max=counts)]
        tasks = torch.arange(num_tasks + 1, device=self.sorted_ids.device)
        return torch.searchsorted(self.sorted_ids, tasks).cpu()

    def sort(self, samples: Tensor) -> Tensor:
        """Brings ``samples`` [B, ...] into task order; as they are if they have it."""
        if self.order is None:
            return samples
        return _permute(samples, *self._permutations(samples.device))

    def unsort(self, samples: Tensor) -> Tensor:
        """Undoes `sort`."""
        if self.inverse is None:
            return samples
        order, inverse = self._permutations(samples.device)
        return _permute(samples, inverse, order)

    def in_task_order(self) -> TaskBatch:
        """The batch of these samples after `sort`; it shares all that is known of them."""
        batch = copy(self)
        batch.task_ids, batch.order, batch.inverse = self.sorted_ids, None, None
        batch._ids = {}
        return batch

    def _permutations(self, device: torch.device) -> tuple[Tensor, Tensor]:
        assert self.order is not None and self.inverse is not None
        if self.order.device == device:
            return self.order, self.inverse
        if device not in self._moved:
            with kept_tensors():
                self._moved[device] = self.order.to(device), self.inverse.to(device)
        return self._moved[device]


def _starts(counts: Sequence[int], task_ids: Tensor) -> Tensor:
    """Where each task's samples start, int64 [number of counts + 1]."""
    starts = torch.tensor([0, *counts], dtype=torch.int64).cumsum(0)
    fits = min(counts, default=0) >= 0 and int(starts[-1]) == task_ids.shape[0]
    if fits and task_ids.device.type == "cpu":
        wanted = torch.repeat_interleave(torch.arange(len(counts)), starts.diff())
        fits = torch.equal(task_ids, wanted)
    if not fits:
        raise ValueError(
            f"tasks: counts must say how many of the [B={task_ids.shape[0]}] ascending task_ids "
            f"belong to each task, got {list(counts)}; without counts any order is fine"
        )
    return starts


def _ends(lengths: Sequence[int], size: int, is_sorted: bool) -> Tensor:
    """Where each packed sample starts, and the last one ends: int64 [B + 1]."""
    if not is_sorted:
        raise ValueError(
            "tasks: lengths need task_ids that ascend, on the CPU or with counts: packed samples "
            "are not sorted here"
        )
    if len(lengths) != size or min(lengths, default=0) < 0:
        raise ValueError(
            f"tasks: lengths must be the rows of each sample, [B={size}] numbers >= 0, got "
            f"{len(lengths)} numbers from {min(lengths, default=0)}"
        )
    return torch.tensor([0, *lengths], dtype=torch.int64).cumsum(0)


@contextmanager
def kept_tensors() -> Iterator[None]:
    """Where tensors are made that outlive the mode in which they were first needed.

    Those made in inference mode cannot be saved for backward later, and those made inside a
    `torch.func` transform are wrapped in it.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def _permute(samples: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    if transformed():
        return samples.index_select(0, order)
    return _Permute.apply(samples, order, inverse)


class _Permute(torch.autograd.Function):
    """samples[order], whose gradient is gathered by the inverse, where torch would scatter-add."""

    @staticmethod
    def forward(ctx: Any, samples: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order, inverse)
        return samples.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        order, inverse = ctx.saved_tensors
        return _Permute.apply(grad, inverse, order), None, None
