"""Which tasks the gradients of a layer are of."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metalora.nn.task_batch import TaskBatch


class SeenTasks:
    """The tasks whose samples have contributed to the gradients of a layer's parameters.

    `note` is called by each forward pass under grad; its tasks count once a gradient has been added
    to a parameter's ``grad``, which a hook tells. So a forward pass without a backward pass does
    not count, as of an evaluation, nor one whose gradients ``torch.autograd.grad`` returns, and
    ``zero_grad`` may stand before or after a forward pass. But a backward pass is taken to be of
    all forward passes under grad since the last backward pass or step: one that is to have none
    counts where another's backward follows before a step, so evaluate under ``torch.no_grad()``.

    Args:
        num_tasks: number of tasks T.
    """

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self._parameters: list[nn.Parameter] = []
        self._passes: set[frozenset[int]] = set()  # of the forward passes since the last backward
        self._latest: set[frozenset[int]] = set()  # of those that the last backward was of
        self._arrived: set[frozenset[int]] = set()  # of all that the gradients are of
        # The gradients that a zero_grad has set to zero and kept.
        self._zeros: list[weakref.ref[Tensor]] = []
        # Compiled code writes here, [T] and whether there was a pass: it could change a set as
        # well, but would be guarded on what the set held, and compiled again for each batch.
        self._flags = torch.zeros(num_tasks + 1, dtype=torch.bool)
        self._on_host = self._flags.numpy()  # the same memory

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hooks onto the layer's trainable parameters, [T, ...] each, onto none twice."""
        for parameter in parameters:
            if not any(parameter is watched for watched in self._parameters):
                self._parameters.append(parameter)
                parameter.register_hook(self._before_gradient)
                parameter.register_post_accumulate_grad_hook(self._after_gradient)

    def note(self, batch: TaskBatch) -> None:
        """A forward pass has begun whose gradients may come."""
        if torch.compiler.is_compiling():
            counts = batch.task_ptr(self.num_tasks, 1).diff()
            self._flags.logical_or_(torch.cat([counts > 0, self._flags.new_ones(1)]))
        else:
            self._passes.add(batch.present(self.num_tasks))

    def tasks(self) -> frozenset[int] | None:
        """The tasks that the gradients are of; None where that is unknown.

        So it is where no backward pass brought any, unless they are those that `zero_grad` has set
        to zero.
        """
        if self._arrived:
            return frozenset().union(*self._arrived)
        return frozenset() if self._zeros and self._are_zeros() else None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """The gradients are gone, or zero; passes whose backward is still to come are not."""
        self._arrived = set()
        grads = [p.grad for p in self._parameters if p.grad is not None]
        self._zeros = [] if set_to_none else [weakref.ref(grad) for grad in grads]

    def _are_zeros(self) -> bool:
        zeros = [zero() for zero in self._zeros]
        grads = [p.grad for p in self._parameters if p.grad is not None]
        return all(any(grad is zero for zero in zeros) for grad in grads)

    def step(self) -> None:
        """The parameters have changed, so no earlier forward pass can have a backward any more."""
        self._passes, self._latest = set(), set()
        self._on_host[:] = False

    def _before_gradient(self, grad: Tensor) -> None:
        """Before a gradient is added to one of the parameters', or returned."""
        if all(parameter.grad is None for parameter in self._parameters):
            self._arrived = set()  # as after model.zero_grad()

    def _after_gradient(self, parameter: Tensor) -> None:
        """After a gradient was added to the parameter's."""
        if self._on_host[-1]:
            self._passes.add(frozenset(self._on_host[:-1].nonzero()[0].tolist()))
            self._on_host[:] = False
        if self._passes:
            self._latest, self._passes = self._passes, set()
        self._arrived = self._arrived | self._latest

    def __reduce__(self) -> Any:
        """A copy is None: the hooks and the optimiser are those of the layer that was copied."""
        return type(None), ()
