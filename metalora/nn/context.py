"""How the tasks of a batch reach the layers that are called in a ``with`` block."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from metalora._checks import check_count
from metalora.nn.task_batch import TaskBatch

P = ParamSpec("P")
R = TypeVar("R")

_LEFT = (
    "tasks: the `with metalora.tasks(...)` block around this code has been left already, by the "
    "code that started this coroutine or by another thread; enter one here"
)
_IN_BACKWARD = (
    "tasks: a layer that runs again inside backward() must have the tasks of its forward pass, not "
    "those around backward(); wrap the function that is run again in metalora.nn.keep_tasks"
)


class _Scope:
    """One ``with metalora.tasks(...)`` block."""

    def __init__(self, batch: TaskBatch | None, problem: str | None) -> None:
        self.batch = batch
        self.problem = problem  # why the batch must not be read; None if it may
        self.left = False
        self.shared: Any = None  # see `metalora.nn.shared_input`
        self.outer = _scope.get()
        self.backward = torch._C._current_graph_task_id()  # the backward pass around; -1: none


# Each thread and each coroutine has its own value. torch.compile can read it since torch 2.14;
# before, it reads that of the thread, so that there compiled models must not share a thread's
# coroutines.
_scope: ContextVar[_Scope | None] = ContextVar("metalora.tasks", default=None)
_COMPILER_READS_SCOPE = torch.__version__ >= "2.14"


class _OfThread(threading.local):
    def __init__(self) -> None:  # torch 2.11 compiles a default of the class in as a constant
        self.scope: _Scope | None = None


_of_thread = _OfThread()


@contextmanager
def tasks(
    task_ids: Tensor | int | TaskBatch,
    num_tasks: int | None = None,
    *,
    counts: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
) -> Iterator[TaskBatch]:
    """Says which task each sample belongs to, for every adapted layer called inside.

    Example:
        ``with metalora.tasks(task_ids): logits = model(inputs)``

    Contexts nest: the innermost counts. One holds for the thread, or the asyncio coroutine, that
    entered it and for coroutines started inside; `keep_tasks` takes it elsewhere. ``backward()``
    may run anywhere: layers that `torch.utils.checkpoint` runs again have the tasks of their
    forward pass.

    If a generator yields inside the block, its caller is inside too until the generator resumes.

    Args:
        task_ids: int64 [B], the task of each sample, in any order; an int, the task of all
            samples; or a `TaskBatch`.
        num_tasks: number of tasks T; ids are then checked at once, those of a `TaskBatch` too.
        counts, lengths: see `TaskBatch`, which has its own.

    Raises:
        TypeError: if ``counts`` or ``lengths`` are given beside a `TaskBatch`.
        TypeError, ValueError: as `TaskBatch` does.
        RuntimeError: on leaving, if the context is not the innermost one of this thread or
            coroutine: contexts are left in the reverse order.
    """
    if isinstance(task_ids, TaskBatch):
        batch = task_ids
        if counts is not None or lengths is not None:
            given = "lengths" if counts is None else "counts"
            raise TypeError(f"tasks: {given} must be given to the TaskBatch itself, not beside it")
        if num_tasks is not None:
            batch.check_range(check_count("tasks", "num_tasks", num_tasks))
    else:
        batch = TaskBatch(task_ids, num_tasks, counts=counts, lengths=lengths)
    with _entered(batch):
        yield batch


def current_tasks() -> TaskBatch | None:
    """The batch of the innermost ``with metalora.tasks(...)`` around the caller, None outside.

    Raises:
        RuntimeError: if that block has been left, which a coroutine may outlive, or if it is around
            a backward pass from inside which it is read.
    """
    compiling = torch.compiler.is_compiling()
    scope = _of_thread.scope if compiling and not _COMPILER_READS_SCOPE else _scope.get()
    if scope is None:
        return None
    if scope.problem is not None:
        raise RuntimeError(scope.problem)
    if not compiling and scope.backward != torch._C._current_graph_task_id():
        raise RuntimeError(_IN_BACKWARD)
    return scope.batch


def current_scope() -> _Scope | None:
    """The innermost ``with metalora.tasks(...)`` block around the caller; None outside."""
    return _scope.get()


def keep_tasks(function: Callable[P, R]) -> Callable[P, R]:
    """Returns ``function`` bound to the tasks of here and now, wherever and whenever it runs.

    For functions that another thread runs, or that backward runs again; those that go through
    `torch.utils.checkpoint` keep their tasks without it.

    Example:
        ``with metalora.tasks(task_ids): future = pool.submit(keep_tasks(model), inputs)``

    Args:
        function: any callable. Bound outside of every ``with metalora.tasks(...)``, it runs
            without tasks.
    """
    scope, batch, problem = _scope.get(), None, None
    if scope is not None:
        batch, problem = scope.batch, scope.problem
        if scope.backward != torch._C._current_graph_task_id():
            problem = _IN_BACKWARD

    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _entered(batch, problem):
            return function(*args, **kwargs)

    return functools.update_wrapper(run, function, updated=())


@contextmanager
def _entered(batch: TaskBatch | None, problem: str | None = None) -> Iterator[None]:
    scope = _Scope(batch, problem)
    _set(scope)
    try:
        yield
    finally:
        scope.left, scope.problem = True, _LEFT
        scope.shared = None  # copies of the context may live on
        if _scope.get() is not scope:
            raise RuntimeError(
                "tasks: left a `with metalora.tasks(...)` block that is not the innermost one "
                "here; leave blocks in the reverse order, where they were entered"
            )
        outer = scope.outer
        while outer is not None and outer.left:  # in the wrong order, which has been reported
            outer = outer.outer
        _set(outer)


def _set(scope: _Scope | None) -> None:
    _scope.set(scope)
    _of_thread.scope = scope
