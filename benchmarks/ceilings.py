"""The two rates that bound every kernel: copying memory, and a dense bfloat16 product.

python -m benchmarks.ceilings [--device cuda] [--write DIR]
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark, Precision
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, OperatorCase, Setup


def _result(setup: Setup) -> Tensor:
    dtype = setup.precision.activations
    return torch.empty(setup.case.sizes["x"], dtype=dtype, device=setup.device)


def _copy(setup: Setup) -> Function:
    return _result(setup).copy_


def _product(setup: Setup) -> Function:
    return partial(torch.mm, out=_result(setup))


def _work(case: OperatorCase, precision: Precision) -> dict[str, Any]:
    left = case.sizes["x"]
    if case.operator == "copy":
        count = 2 * prod(left) * precision.activations.itemsize  # read and written
        return {"unit": "GB/s", "scale": 1e9, "amounts": {"forward": count}}
    count = 2 * prod(left) * left[1]
    return {"unit": "TFLOP/s", "scale": 1e12, "amounts": {"forward": count}}


def _cases(group: str, copied: int, size: int) -> tuple[OperatorCase, ...]:
    name, copy, product = f"{copied >> 20} Mi numbers", {"torch": _copy}, {"torch": _product}
    square = {"x": (size, size), "weight": (size, size)}
    return (
        OperatorCase("copy", group, f"copy, {name}", {"x": (copied,)}, copy, torch.clone, _work),
        OperatorCase("mm", group, f"product, {size}×{size}", square, product, torch.mm, _work),
    )


BENCHMARK = Benchmark(
    "ceilings",
    "What the machine can do",
    (*_cases("cpu", 2**26, 1024), *_cases("cuda", 2**29, 8192)),
    {"all": ("torch",)},
    floor="torch",
    precisions=("bf16",),
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
