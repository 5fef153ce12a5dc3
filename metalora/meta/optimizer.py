"""Optimisers, also such that step the tasks of one batch and leave the others' state alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from metalora.adapters import task_parameters


def make_optimizer(
    name: str, parameters: list[nn.Parameter] | list[Tensor], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimiser called ``name``, fused where torch can."""
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay, fused=fused)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused)


class TaskwiseLeaves:
    """Presents each task's slice of the stacked parameters to an optimiser as its own parameter.

    Adam moves a parameter, and counts a step for it, also where its gradient is zero; one without
    a gradient it leaves alone. So a task that is absent from a batch keeps its adapters, their
    moments and their step count, just as if it had an optimiser of its own.

    The slices share storage with the parameters; `give_gradients` hands over their gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self._stacked = [p for p in task_parameters(model) if p.requires_grad]
        stacked = {id(p) for p in self._stacked}
        self._shared = [p for p in model.parameters() if p.requires_grad and id(p) not in stacked]
        self._slices = [
            [part.requires_grad_() for part in p.detach().unbind()] for p in self._stacked
        ]

    def parameters(self) -> list[Tensor]:
        """The shared parameters and every task's slices, for the optimiser."""
        return [*self._shared, *(part for slices in self._slices for part in slices)]

    def give_gradients(self, present: Iterable[int]) -> None:
        """Moves the gradients of the tasks in ``present`` from the parameters to the slices."""
        present = set(present)
        for stacked, slices in zip(self._stacked, self._slices, strict=True):
            for task, part in enumerate(slices):
                part.grad = (
                    stacked.grad[task] if stacked.grad is not None and task in present else None
                )
