"""The base of all layers with parameters per task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metalora._checks import check_count
from metalora._transforms import faking
from metalora._warn import warn_user
from metalora.nn.context import current_tasks
from metalora.nn.seen_tasks import SeenTasks
from metalora.nn.task_batch import TaskBatch


class TaskLayer(nn.Module):
    """A linear layer of which some parameters exist once per task, stacked along dimension 0."""

    task_parameters: ClassVar[tuple[str, ...]]
    """Names of the parameters whose first dimension is the task."""

    in_features: int
    out_features: int
    seen: SeenTasks | None = None
    """Records the tasks that the gradients are of, after `watch_tasks` was called."""

    _held: tuple[int, list[int]] | None = None  # of how many tasks which are held, if not all
    _frozen: frozenset[str] = frozenset()  # the per-task parameters that were frozen before
    _order_noted: bool = False  # whether it was warned that the order of rows is not known

    def __init__(self, num_tasks: int, name: str = "") -> None:
        super().__init__()
        self.num_tasks = check_count(type(self).__name__, "num_tasks", num_tasks)
        self.name = name

    def reset_task_parameters(self) -> None:
        """Draws the per-task parameters afresh."""
        raise NotImplementedError

    def to_linear(self, task: int | None = None) -> nn.Module:
        """The plain layer of one task, or (None) without adapters, heads averaged over tasks."""
        raise NotImplementedError

    def hold_tasks(self, tasks: Sequence[int]) -> None:
        """Drops all tasks but these, which are numbered 0, 1, ... from now on.

        For task parallelism, where each process holds some tasks. Of tasks that are numbered so
        already some may be dropped again.

        Raises:
            ValueError: if there are none, or one is not a task of this layer.
        """
        if not tasks:
            raise ValueError(f"{self._where()}: tasks must be at least one, got none")
        chosen = [self.check_task(task) for task in tasks]
        for parameter in self.own_task_parameters().values():
            parameter.data = parameter.data[chosen]
        if self._held is None:
            self._held = self.num_tasks, chosen
        else:
            total, before = self._held
            self._held = total, [before[task] for task in chosen]
        self.num_tasks = len(chosen)

    def redraw_tasks(self) -> None:
        """Draws the per-task parameters afresh, each as if all tasks were held and drawn here."""
        held, self._held = self._held, None
        if held is not None:
            self.num_tasks = held[0]
            for parameter in self.own_task_parameters().values():
                parameter.data = parameter.data.new_empty(self.num_tasks, *parameter.shape[1:])
        self.reset_task_parameters()
        if held is not None:
            self.hold_tasks(held[1])

    def own_task_parameters(self) -> dict[str, nn.Parameter]:
        """The per-task parameters this layer has, by name; each is [T, ...]."""
        found = {name: getattr(self, name) for name in self.task_parameters}
        return {name: parameter for name, parameter in found.items() if parameter is not None}

    def note_frozen(self, plain: nn.Module) -> None:
        """Remembers which parameters of the plain layer are frozen, for `is_trained`."""
        self._frozen = frozenset(n for n, p in plain.named_parameters() if not p.requires_grad)

    def is_trained(self, name: str) -> bool:
        """Whether a per-task parameter requires a gradient in the plain layer that takes it."""
        trained: bool = getattr(self, name).requires_grad
        return trained and name not in self._frozen

    def check_task(self, task: int) -> int:
        """Returns ``task`` if this layer has it, else raises ValueError."""
        if isinstance(task, bool) or not isinstance(task, int):
            raise TypeError(f"{self._where()}: task must be an int, got {type(task).__name__}")
        if not 0 <= task < self.num_tasks:
            raise ValueError(
                f"{self._where()}: task must be in 0..{self.num_tasks - 1}, got {task}"
            )
        return task

    def watch_tasks(self) -> SeenTasks:
        """Starts recording the tasks that the gradients of trainable per-task parameters are of.

        For an optimiser that steps those tasks alone.
        """
        if self.seen is None:
            self.seen = SeenTasks(self.num_tasks)
        self.seen.watch([p for p in self.own_task_parameters().values() if p.requires_grad])
        return self.seen

    def batch_of(self, x: Tensor, tasks: TaskBatch | None) -> TaskBatch | None:
        """The tasks for ``x`` [B, ..., in]; None if there is only one task and none were given.

        Raises:
            TypeError: if ``tasks`` is no `TaskBatch`.
            ValueError: if the shape of ``x`` does not fit, or no tasks are known.
        """
        if x.dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(
                f"{self._where()}: x must be [B, ..., in={self.in_features}], got {list(x.shape)}"
            )
        batch = current_tasks() if tasks is None else tasks
        if batch is None:
            if self.num_tasks == 1:
                return None
            raise ValueError(
                f"{self._where()}: which task does each sample belong to? Call the model inside "
                f"`with metalora.tasks(task_ids):` ({self.num_tasks} tasks; metalora.nn.keep_tasks "
                "takes them to another thread)"
            )
        if not isinstance(batch, TaskBatch):
            got = type(batch).__name__
            raise TypeError(f"{self._where()}: tasks must be a TaskBatch, got {got}")
        fits = x.shape[0] == batch.size or (batch.size > 0 and x.shape[0] % batch.size == 0)
        if not fits and not batch.packs(x):
            packed = f" or packed [1, {batch.packed_rows}, in]" if batch.packed_rows else ""
            shared = ", as relative positions are," if x.shape[0] == 1 else " or routed to experts,"
            raise ValueError(
                f"{self._where()}: x must have its samples first, [B={batch.size}, ..., in] or "
                f"[B·n, ..., in] sample by sample{packed}, as task_ids are [{batch.size}]; "
                f"got {list(x.shape)}; if this input is shared by all samples{shared} exclude the "
                "layer (exclude_modules)"
            )
        if not torch.compiler.is_compiling():
            self._note_order(x, batch)
        if self.seen is not None and torch.is_grad_enabled():
            self.seen.note(batch)
        return batch

    def _note_order(self, x: Tensor, batch: TaskBatch) -> None:
        """Warns, once, if rows [B·n, ...] may be in another order than sample by sample.

        They are in that order if a layer before, or who made the ids, has shown that samples have
        n parts each; any order will do if all samples are of one task.
        """
        size = batch.size
        if x.shape[0] == size or size == 0:
            if x.dim() > 2 and not faking():
                batch.parts.add(math.prod(x.shape[1:-1]))
            return
        if self._order_noted or self.num_tasks == 1 or batch.packs(x) or faking():
            return
        parts = x.shape[0] // size
        if parts in batch.parts or batch.of_one_task():
            return
        self._order_noted = True
        if parts in batch.order_noted:  # one warning for all layers with as many parts
            return
        batch.order_noted.add(parts)
        first = ""
        if x.dim() > 2 and x.shape[1] == size:
            first = " If it is sequence-first, [L, B, ...], have the samples first."
        warn_user(
            f"sample order: {self._where()} takes x {list(x.shape)} for {parts} rows of each of "
            f"the {size} samples in turn, as of a flattened [B={size}, {parts}, ...]. If it holds "
            f"{parts} views of the samples, one batch behind the other, give "
            f"task_ids.repeat({parts}).{first} If samples may have unequal numbers of rows, as "
            "images of several sizes have, exclude this layer (exclude_modules). If it is right, "
            "as in the beams and returned sequences of generate, say so with "
            "warnings.filterwarnings('ignore', 'sample order')"
        )

    def sort_rows(self, x: Tensor, batch: TaskBatch | None) -> tuple[Tensor, Tensor]:
        """x [B, ..., in] → its rows [M, in] in task order, and task_ptr [T + 1] on the CPU."""
        if batch is None:
            rows = x.reshape(-1, self.in_features)
            return rows, torch.arange(2) * rows.shape[0]
        if batch.size == 0:
            rows = x.reshape(0, self.in_features)
            return rows, torch.zeros(self.num_tasks + 1, dtype=torch.int64)
        if batch.packs(x):
            return x.reshape(-1, self.in_features), batch.task_ptr(self.num_tasks, None)
        per_sample = rows_per_sample(x, batch)
        samples = x.reshape(batch.size, per_sample, self.in_features)
        rows = batch.sort(samples).reshape(-1, self.in_features)
        return rows, batch.task_ptr(self.num_tasks, per_sample)

    def restore_rows(self, rows: Tensor, x: Tensor, batch: TaskBatch | None) -> Tensor:
        """Rows [M, out] in task order → [B, ..., out] in the order of x [B, ..., in]."""
        if batch is not None and batch.order is not None and batch.size:
            per_sample = rows_per_sample(x, batch)
            rows = batch.unsort(rows.reshape(batch.size, per_sample, self.out_features))
        return rows.reshape(*x.shape[:-1], self.out_features)

    def _where(self) -> str:
        return f"{type(self).__name__} {self.name!r}" if self.name else type(self).__name__

    def _number(self) -> str:
        return f"tasks={self.num_tasks}" + (f" of {self._held[0]}" if self._held else "")

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, {self._number()}"


def rows_per_sample(x: Tensor, batch: TaskBatch) -> int:
    """How many rows of x [B·n, ..., in] belong to a sample; B > 0."""
    inner = math.prod(x.shape[1:-1])
    # Not divided where nothing is to divide: torch.compile then has no quotient to reason about.
    return inner if x.shape[0] == batch.size else inner * (x.shape[0] // batch.size)


def new_parameter(like: Tensor, *shape: int) -> nn.Parameter:
    """A trainable parameter of this shape with the dtype and device of ``like``, not yet filled."""
    options: dict[str, Any] = {"device": like.device, "dtype": like.dtype}
    return nn.Parameter(torch.empty(*shape, **options))
