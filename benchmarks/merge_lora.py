"""Times `merge_lora` and `merge_lora_symmetric` beside plain PyTorch and a copy of as many bytes.

python -m benchmarks.merge_lora [--device cuda] [--write DIR]

Both are bound by memory: "copy" moves as many bytes as must be read and written. A time of 1.25
relative to it is 80 % of a copy's bandwidth, which the kernels are to reach from 64 MB on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark, Candidate, Options, Precision
from benchmarks.lib.measure import Steps, copies_past_the_cache, graphed
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import SCALING, Function, OperatorCase, Setup
from metalora import ops, reference


def _metalora(setup: Setup) -> Function:
    dtype = setup.precision.activations
    if "lora_U" in setup.case.sizes:
        return partial(ops.merge_lora_symmetric, dtype=dtype)
    return partial(ops.merge_lora, scaling=SCALING, dtype=dtype)


def _plain(setup: Setup) -> Function:
    """One batched product in plain PyTorch, rounded once, with the update in."""

    def merge(weight: Tensor, *factors: Tensor) -> Tensor:
        left, right, scaling = factors[-1], factors[0], SCALING
        if len(factors) == 1:
            right, scaling = left.mT, 1.0
        with torch.autocast(weight.device.type, enabled=False):
            merged = torch.baddbmm(weight.unsqueeze(0), left, right, alpha=scaling)
        return merged.to(setup.precision.activations)

    return merge


def traffic(case: OperatorCase, precision: Precision) -> dict[str, int]:
    """Bytes of each step, if every input is read once and every result written once."""
    sizes = {name: prod(shape) for name, shape in case.sizes.items()}
    merged = sizes.pop("grad") * precision.activations.itemsize
    inputs = sum(sizes.values()) * precision.parameters.itemsize
    factors = inputs - sizes["weight"] * precision.parameters.itemsize
    return {"forward": inputs + merged, "backward": merged + factors + inputs}


def _work(case: OperatorCase, precision: Precision) -> dict[str, Any]:
    return {"unit": "GB/s", "scale": 1e9, "amounts": traffic(case, precision)}


class MergeCase(OperatorCase):
    """W merged for all tasks into the dtype of the activations, and back."""

    def offered(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        make = super().candidates(precision, options)

        def copy() -> Candidate:
            bytes_moved, device, sets = traffic(self, precision), options.device, []
            for _ in range(copies_past_the_cache(min(bytes_moved.values()), device)):
                steps: Steps = {}
                for name, count in bytes_moved.items():
                    source = torch.zeros(count // 2, dtype=torch.uint8, device=device)
                    steps = {**steps, name: partial(torch.empty_like(source).copy_, source)}
                sets.append(graphed(steps)[0] if device == "cuda" else steps)
            return Candidate(sets, error=0.0)

        return lambda version: copy() if version == "copy" else make(version)


def _case(group: str, tasks: int, outer: int, inner: int, rank: int) -> MergeCase:
    shapes = {
        "weight": (outer, inner),
        "lora_A": (tasks, rank, inner),
        "lora_B": (tasks, outer, rank),
        "grad": (tasks, outer, inner),
    }
    exact = partial(reference.merge_lora, scaling=SCALING)
    name = f"T{tasks} {inner}→{outer} r{rank}"
    return MergeCase("merge_lora", group, name, shapes, FUNCTIONS, exact, _work)


def _symmetric(group: str, tasks: int, dim: int, rank: int) -> MergeCase:
    shapes = {"weight": (dim, dim), "lora_U": (tasks, dim, rank), "grad": (tasks, dim, dim)}
    exact, name = reference.merge_lora_symmetric, f"T{tasks} {dim}→{dim} k{rank}, symmetric"
    return MergeCase("merge_lora_symmetric", group, name, shapes, FUNCTIONS, exact, _work)


FUNCTIONS = {"metalora": _metalora, "plain": _plain}
BENCHMARK = Benchmark(
    "merge_lora",
    "Merged weights of all tasks, forward + backward",
    (
        _case("cpu", 10, 768, 768, 8),
        _case("cpu", 4, 256, 512, 1),
        _symmetric("cpu", 3, 20, 3),
        _symmetric("cpu", 10, 768, 8),
        _case("cuda", 10, 768, 768, 8),
        _case("cuda", 10, 3072, 768, 8),
        _case("cuda", 4, 4096, 4096, 16),
        _case("cuda", 16, 4096, 4096, 16),
        _case("cuda", 16, 4096, 4096, 64),
        _symmetric("cuda", 10, 768, 8),
        _symmetric("cuda", 16, 4096, 16),
    ),
    {"all": tuple(FUNCTIONS)},
    floor="copy",
    precisions=("autocast", "tf32", "fp32"),
    can_freeze=True,
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
