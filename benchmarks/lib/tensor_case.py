"""Operators on tensors: forward and backward of every version on the same random tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Candidate, Case, Options, Precision
from benchmarks.lib.gate import GateError, check_parts
from benchmarks.lib.measure import (
    Steps,
    beside_default_stream,
    copies_past_the_cache,
    graphed,
    peak_bytes,
)

SCALING = 0.5
SEED = 7  # of the dropout mask where results are compared
Function = Callable[..., Tensor]


@dataclass(frozen=True)
class Setup:
    """What a version may know before it sees its tensors.

    ``seed`` fixes the dropout mask, so that results can be compared; None is what one would train
    with.
    """

    case: Any
    precision: Precision
    device: str = "cpu"
    seed: int | None = None


class TensorCase(Case):
    """A function of tensors to one tensor, forward and backward."""

    functions: Mapping[str, Callable[[Setup], Function]]  # of the versions

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the inputs by name and, last, where there is a backward pass, of ``grad``."""
        raise NotImplementedError

    def exact(self, version: str, **inputs: Tensor) -> Tensor:
        """What a version is to compute, in float64."""
        raise NotImplementedError

    def without(self, version: str) -> tuple[str, ...]:
        """The inputs that a version does not use."""
        return ()

    def tensors(
        self, precision: Precision, device: str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        """Random inputs and the result's gradient, by name."""
        generator = torch.Generator(device).manual_seed(seed)
        found = {}
        for name, shape in self.shapes().items():
            activation = name in ("x", "grad")
            dtype = precision.activations if activation else precision.parameters
            tensor = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            found[name] = tensor if activation or name == "bias" else tensor * shape[-1] ** -0.5
        return found

    def parts(self, name: str, result: Tensor) -> Sequence[Tensor]:
        """A result in the parts whose errors are taken apart, such as tasks."""
        return [result]

    def wanted(self, version: str, frozen: bool, tensors: Mapping[str, Tensor]) -> list[str]:
        """The inputs whose gradients are taken."""
        if "grad" not in tensors:
            return []
        left_out = (*self.without(version), *(("weight", "bias") if frozen else ()), "grad")
        return [name for name in tensors if name not in left_out]

    def exact_results(
        self, version: str, tensors: Mapping[str, Tensor], wanted: Sequence[str]
    ) -> dict[str, Tensor]:
        """The reference's result "y" and gradients in float64, from the very same values."""
        double = {
            name: t.detach().double() if t.is_floating_point() else t for name, t in tensors.items()
        }
        grad = double.pop("grad", None)
        leaves = [double[name].requires_grad_() for name in wanted]
        y = self.exact(version, **double)
        gradients = torch.autograd.grad(y, leaves, grad) if wanted else []
        return {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}

    def check(
        self,
        version: str,
        got: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        tolerance: float,
    ) -> float:
        """The largest relative error of any part of any result.

        Raises:
            GateError: if it is above the tolerance, or a result is missing or of another shape.
        """
        worst = 0.0
        for name, right in exact.items():
            if name not in got:
                raise GateError(f"there is no gradient of {name}")
            if got[name].shape != right.shape:
                raise GateError(f"{name} is {list(got[name].shape)}, not {list(right.shape)}")
            parts = zip(self.parts(name, got[name]), self.parts(name, right), strict=True)
            worst = max(worst, *(check_parts(name, a[None], b[None], tolerance) for a, b in parts))
        return worst

    def run(
        self,
        version: str,
        tensors: Mapping[str, Tensor],
        setup: Setup,
        frozen: bool = False,
        function: Function | None = None,
    ) -> Run:
        """A version on one set of tensors; ``function`` is it where it has been made before."""
        wanted = self.wanted(version, frozen, tensors)
        function = function or self.functions[version](setup)
        return Run(function, tensors, wanted, setup.precision)

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        device = options.device
        first = self.tensors(precision, device)
        copies = copies_past_the_cache(sum(t.nbytes for t in first.values()), device)
        sets = [first] + [self.tensors(precision, device, seed) for seed in range(1, copies)]

        exact_results: dict[tuple[str, ...], dict[str, Tensor]] = {}

        def make(version: str) -> Candidate:
            left_out = self.without(version)
            if left_out not in exact_results:
                wanted = self.wanted(version, options.frozen, first)
                exact_results[left_out] = self.exact_results(version, first, wanted)
            exact = exact_results[left_out]
            run = self.run(version, first, Setup(self, precision, device, SEED), options.frozen)
            run.call(device)
            error = self.check(version, run.results, exact, precision.tolerance)
            # Where nothing is random, the function that was checked is the one that is timed.
            random = getattr(self, "dropout", 0.0) > 0
            function = None if random else run.function
            setup = Setup(self, precision, device)
            function = function or self.functions[version](setup)
            runs = [self.run(version, t, setup, options.frozen, function) for t in sets]
            peak = _peak_memory(runs[0], device)
            note, steps = "", []
            for run in runs:
                one = run.steps()
                if device == "cuda" and not note:
                    run.call(device)
                    one, note = graphed(one)
                steps.append(one)
            if device == "cuda" and not note and not random:
                for step in steps[0].values():
                    step()
                self.check(version, runs[0].results, exact, precision.tolerance)
            return Candidate(steps, error, peak_bytes=peak, note=note)

        return make


@dataclass(frozen=True, eq=False)
class OperatorCase(TensorCase):
    """A case that its shapes describe; ``work``: (unit, scale, amounts) of a precision's steps."""

    sizes: Mapping[str, tuple[int, ...]]
    functions: Mapping[str, Callable[[Setup], Function]]
    reference: Function
    work: Callable[[Any, Precision], dict[str, Any]] | None = None

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.sizes

    def offered(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.functions]

    def exact(self, version: str, **inputs: Tensor) -> Tensor:
        return self.reference(*inputs.values())

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        return {} if self.work is None else {"work": self.work(self, precision)}

    def shrunk(self) -> OperatorCase:
        sizes = {k: tuple(min(24, n) for n in shape) for k, shape in self.sizes.items()}
        return replace(self, sizes=sizes)


class Run:
    """Forward and backward of a function on one set of tensors; keeps the last call's results."""

    def __init__(
        self,
        function: Function,
        tensors: Mapping[str, Tensor],
        wanted: Sequence[str],
        precision: Precision,
    ) -> None:
        self.function, self.precision = function, precision
        inputs = {
            name: t.detach().requires_grad_(name in wanted)
            for name, t in tensors.items()
            if name != "grad"
        }
        self.inputs, self.grad = list(inputs.values()), tensors.get("grad")
        self.leaves = {name: inputs[name] for name in wanted}
        self.results: dict[str, Tensor] = {}

    def forward(self) -> None:
        self.results = {}
        with self.precision.casting(self.inputs[0].device.type):
            self.results["y"] = self.function(*self.inputs)

    def backward(self) -> None:
        gradients = torch.autograd.grad(
            self.results["y"], list(self.leaves.values()), self.grad, allow_unused=True
        )
        found = zip(self.leaves, gradients, strict=True)
        self.results |= {name: g for name, g in found if g is not None}

    def steps(self) -> Steps:
        """What is timed, apart."""
        forward: Steps = {"forward": self.forward}
        return {**forward, "backward": self.backward} if self.leaves else forward

    def call(self, device: str) -> None:
        """Runs once; on a GPU beside the default stream, so that a graph can follow."""
        with beside_default_stream(device):
            for step in self.steps().values():
                step()


def _peak_memory(run: Run, device: str) -> int | None:
    """Bytes that forward and backward take beside the inputs, results included."""
    if device == "cpu":
        return None
    run.call(device)
    run.results = {}
    return peak_bytes(lambda: run.call(device), device)
