"""Fused steps of SGD, Adam and AdamW on some tasks of stacked parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

TASKS_WITH_STATE = "tasks_with_state"  # bool [T], in the state of a parameter whose tasks are apart
_PARAMETER, _GRAD, _STEP, _BUFFER = "parameter", "grad", "step", "momentum_buffer"


class StackedState:
    """What SGD, Adam or AdamW keeps of each task of a parameter.

    Args:
        parameter: [T, ...], contiguous.
        state: of the parameter when it was stepped whole, or ``values`` of another state.

    Attributes:
        values: by name: [T, ...] each, step counts [T], and `TASKS_WITH_STATE`. Empty before the
            first step, and for SGD without momentum.
    """

    def __init__(self, parameter: Tensor, state: Mapping[str, Any]) -> None:
        self.parameter = parameter
        self.values = {k: v for k, v in state.items() if v is not None}
        for name, value in self.values.items():
            if name == _STEP:
                self.values[name] = value.to(parameter.device).expand(len(parameter)).contiguous()
            elif name != TASKS_WITH_STATE:
                self.values[name] = value.to(parameter)
        if self.values and TASKS_WITH_STATE not in state:
            self.values[TASKS_WITH_STATE] = torch.ones(len(parameter), dtype=torch.bool)
        self._slices: dict[str, tuple[Tensor, ...]] = {}
        self._rows = torch.empty(0)  # for `gradients`
        self._slices_of_rows: tuple[Tensor, ...] = ()

    def begin(self, names: Sequence[str]) -> None:
        """Makes the values of these names, and the step counts that are among them, if missing."""
        if self.values or not names:
            return
        tasks, zeros = len(self.parameter), torch.zeros_like(self.parameter.detach())
        for name in names:
            self.values[name] = zeros.new_zeros(tasks).float() if name == _STEP else zeros.clone()
        self.values[TASKS_WITH_STATE] = torch.zeros(tasks, dtype=torch.bool)

    def gradients(self, index: Tensor, first: int) -> Sequence[Tensor]:
        """Copies of some tasks' gradients, in memory that is kept from step to step.

        Making slices of 640 tasks takes twice as long as stepping them.

        Args:
            index: the tasks.
            first: how many tasks' gradients of this step were asked for before.
        """
        grad, end = self.parameter.grad, first + len(index)
        assert grad is not None
        rows = self._rows
        if (rows.device, rows.dtype) != (grad.device, grad.dtype) or len(rows) < end:
            self._rows = grad.new_empty(end, *grad.shape[1:])
            self._slices_of_rows = self._rows.unbind()
        torch.index_select(grad, 0, index, out=self._rows[first:end])
        return self._slices_of_rows[first:end]

    def slices(self, name: str, tasks: Sequence[int]) -> list[Tensor]:
        """Some tasks' parts of a value, or of the parameter, in its memory."""
        whole = self.parameter.detach() if name == _PARAMETER else self.values[name]
        known = self._slices.get(name)
        if known is None or known[0].data_ptr() != whole.data_ptr():  # as after model.to(device)
            known = self._slices[name] = whole.unbind()
        return [known[task] for task in tasks]


def step_tasks(
    kind: type[Optimizer],
    settings: Mapping[str, Any],
    tasks: Mapping[StackedState, Sequence[int]],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Steps tasks as torch's fused optimiser of each task alone would.

    Args:
        kind: SGD, Adam or AdamW.
        settings: of the group that the parameters are in.
        tasks: of each parameter, which has a gradient, those to step.
        grad_scale: what gradients are divided by first.
        found_inf: 1 if nothing is to be changed.
    """
    if kind is SGD:
        names = [_BUFFER] if settings["momentum"] else []
    else:
        names = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * settings["amsgrad"], _STEP]
    # A kernel takes tensors of one device and dtype and, with momentum, tasks that all have some
    # already, or none.
    calls: dict[Any, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    for state, present in tasks.items():
        state.begin(names)
        parameter, values, parts = state.parameter, state.values, {True: present}
        if _BUFFER in names:
            has = values[TASKS_WITH_STATE].tolist()
            parts = {begun: [t for t in present if has[t] is begun] for begun in (True, False)}
        copied = 0
        for begun, chosen in parts.items():
            index = torch.tensor(chosen, dtype=torch.int64, device=parameter.device)
            if _STEP in names:
                values[_STEP].index_add_(0, index, torch.ones_like(index, dtype=torch.float32))
            lists = calls[parameter.device, parameter.dtype, begun]
            lists[_GRAD] += state.gradients(index, copied)
            copied += len(chosen)
            for name in (_PARAMETER, *names):
                lists[name] += state.slices(name, chosen)
        if names:
            values[TASKS_WITH_STATE][list(present)] = True
    for (device, _, begun), lists in calls.items():
        if not lists[_GRAD]:
            continue
        same: dict[str, Any] = {name: settings[name] for name in ("lr", "weight_decay", "maximize")}
        same["grad_scale"] = None if grad_scale is None else grad_scale.to(device)
        same["found_inf"] = None if found_inf is None else found_inf.to(device)
        first = lists[_PARAMETER], lists[_GRAD]
        if kind is SGD:
            same |= {name: settings[name] for name in ("momentum", "dampening", "nesterov")}
            torch._fused_sgd_(*first, lists[_BUFFER], is_first_step=not begun, **same)
            continue
        step = torch._fused_adamw_ if settings["decoupled_weight_decay"] else torch._fused_adam_
        kept = [lists[name] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", _STEP)]
        same |= {name: settings[name] for name in ("eps", "amsgrad")}
        beta1, beta2 = settings["betas"]
        step(*first, *kept, beta1=beta1, beta2=beta2, **same)
        if found_inf is not None:
            torch._foreach_sub_(lists[_STEP], [same["found_inf"]] * len(lists[_STEP]))
