"""Which tasks the gradients of a layer are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from metalora.nn.task_batch import TaskBatch


class SeenTasks:
    """The tasks whose samples have contributed to the gradients of a layer's parameters.

    `note` is called by each forward pass under grad, and a hook on the parameters by each backward
    pass, which decides: a forward pass without one, as of an evaluation, has no gradient to tell
    the tasks of, and ``zero_grad`` may stand before or after a forward pass.

    Args:
        num_tasks: number of tasks T.
    """

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self._parameters: list[nn.Parameter] = []
        self._passes: set[frozenset[int]] = set()  # of the forward passes since the last backward
        self._latest: set[frozenset[int]] = set()  # of those that the last backward was of
        self._arrived: set[frozenset[int]] = set()  # of all that the gradients are of
        # Compiled code writes here, [T] and whether there was a pass: it could change a set as
        # well, but would be guarded on what the set held, and compiled again for each batch.
        self._flags = torch.zeros(num_tasks + 1, dtype=torch.bool)
        self._on_host = self._flags.numpy()  # the same memory

    def watch(self, parameters: Sequence[nn.Parameter]) -> None:
        """Hooks onto the layer's trainable parameters, [T, ...] each, onto none twice."""
        for parameter in parameters:
            if not any(parameter is watched for watched in self._parameters):
                self._parameters.append(parameter)
                parameter.register_hook(self._on_gradient)

    def note(self, batch: TaskBatch) -> None:
        """A forward pass has begun whose gradients may come."""
        if torch.compiler.is_compiling():
            counts = batch.task_ptr(self.num_tasks, 1).diff()
            self._flags.logical_or_(torch.cat([counts > 0, self._flags.new_ones(1)]))
        else:
            self._passes.add(batch.present(self.num_tasks))

    def tasks(self) -> frozenset[int] | None:
        """The tasks that the gradients are of; None where no backward pass brought any."""
        return frozenset().union(*self._arrived) if self._arrived else None

    def zero_grad(self) -> None:
        """The gradients are gone; passes whose backward is still to come are not."""
        self._arrived = set()

    def step(self) -> None:
        """The parameters have changed, so no earlier forward pass can have a backward any more."""
        self._passes = set()
        self._on_host[:] = False

    def _on_gradient(self, grad: Tensor) -> None:
        """Before a gradient is added to one of the parameters'."""
        if self._on_host[-1]:
            self._passes.add(frozenset(self._on_host[:-1].nonzero()[0].tolist()))
            self._on_host[:] = False
        if self._passes:
            self._latest, self._passes = self._passes, set()
        if all(parameter.grad is None for parameter in self._parameters):
            self._arrived = set()  # as after model.zero_grad()
        self._arrived = self._arrived | self._latest

    def __reduce__(self) -> Any:
        """A copy is None: the hooks and the optimiser are those of the layer that was copied."""
        return type(None), ()
