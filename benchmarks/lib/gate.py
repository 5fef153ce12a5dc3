"""The correctness gate: outputs and gradients against float64, task by task, before any timing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.lib.baselines import Layer
from benchmarks.lib.registry import INPUTS, SCALING, Case, Precision
from metalora import reference

FROZEN = ("x", "lora_A", "lora_B")  # what gets gradients where W is frozen
SEED = 7  # of the dropout mask where results are compared


class GateError(AssertionError):
    """A layer's results are not those of the reference."""


class Run:
    """Forward and backward of a layer on one set of tensors, with the results of the last call."""

    def __init__(
        self, layer: Layer, tensors: Sequence[Tensor], wanted: Sequence[str], precision: Precision
    ) -> None:
        *inputs, self.grad_y = tensors
        self.inputs = [
            t.detach().requires_grad_(name in wanted)
            for name, t in zip(INPUTS, inputs, strict=True)
        ]
        self.leaves = {n: t for n, t in zip(INPUTS, self.inputs, strict=True) if n in wanted}
        self.layer, self.precision = layer, precision
        self.results: dict[str, Tensor] = {}

    def forward(self) -> None:
        self.results = {}
        with self.precision.casting(self.grad_y.device.type):
            self.results["y"] = self.layer(*self.inputs)

    def backward(self) -> None:
        gradients = torch.autograd.grad(
            self.results["y"], list(self.leaves.values()), self.grad_y, allow_unused=True
        )
        found = zip(self.leaves, gradients, strict=True)
        self.results |= {name: g for name, g in found if g is not None}


def wanted_gradients(adapters: bool, frozen: bool) -> tuple[str, ...]:
    """The inputs whose gradients are taken; a layer without adapters has none for them."""
    names = FROZEN if frozen else INPUTS
    return tuple(n for n in names if adapters or not n.startswith("lora"))


def exact_results(
    case: Case, tensors: Sequence[Tensor], wanted: Sequence[str], adapters: bool = True
) -> dict[str, Tensor]:
    """The reference's results in float64, from the very values of the tensors."""
    x, weight, bias, lora_A, lora_B, grad_y = (t.detach().double() for t in tensors)
    if not adapters:
        lora_B = torch.zeros_like(lora_B)
    inputs = dict(zip(INPUTS, (x, weight, bias, lora_A, lora_B), strict=True))
    leaves = [inputs[name].requires_grad_() for name in wanted]
    seed = torch.tensor(SEED, device=x.device)
    y = reference.lora_linear(
        *(x, weight, bias, lora_A, lora_B, case.task_ptr(), SCALING, case.dropout, seed)
    )
    gradients = torch.autograd.grad(y, leaves, grad_y)
    return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}


def check(
    case: Case, got: Mapping[str, Tensor], exact: Mapping[str, Tensor], tolerance: float
) -> float:
    """The largest relative error ‖got - exact‖ / ‖exact‖ of any result, and of any task in it.

    Raises:
        GateError: if it is above the tolerance, or a result is missing or of another shape.
    """
    worst = 0.0
    for name, wanted in exact.items():
        if name not in got:
            raise GateError(f"there is no gradient of {name}")
        if got[name].shape != wanted.shape:
            raise GateError(f"{name} is {list(got[name].shape)}, not {list(wanted.shape)}")
        tasks = (_by_task(case, name, result) for result in (got[name], wanted))
        for mine, right in zip(*tasks, strict=True):
            error = _relative(mine.double(), right)
            if not error <= tolerance:
                raise GateError(
                    f"{name} has a relative error of {error:.1e}, above {tolerance:.0e}"
                )
            worst = max(worst, error)
    return worst


def _relative(got: Tensor, exact: Tensor) -> float:
    difference, size = float((got - exact).norm()), float(exact.norm())
    if size == 0:
        return 0.0 if difference == 0 else float("inf")
    return difference / size


def _by_task(case: Case, name: str, result: Tensor) -> Sequence[Tensor]:
    if name in ("x", "y"):
        return result.detach().split(list(case.rows))
    return result.unbind() if name.startswith("lora") else [result]
