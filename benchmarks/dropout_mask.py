"""Times `dropout_mask`, a mask that its seed alone decides, beside torch's own random numbers.

python -m benchmarks.dropout_mask [--device cuda] [--write DIR]

Times are relative to ``torch.rand(rows, columns) >= p``, which nothing can draw again. metalora's
mask must equal the reference's element by element; of torch's only the share kept can be checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark, Precision
from benchmarks.lib.gate import GateError
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import SEED, Function, Setup, TensorCase
from metalora import ops, reference

P = 0.1


def _seeded(mask: Callable[..., Tensor], setup: Setup) -> Function:
    return lambda seed: mask(seed, P, setup.case.rows, setup.case.columns)


def _torch(setup: Setup) -> Function:
    shape = (setup.case.rows, setup.case.columns)
    return lambda seed: torch.rand(shape, device=seed.device) >= P


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {
    "torch": _torch,
    "metalora": partial(_seeded, ops.dropout_mask),
    "plain": partial(_seeded, reference.dropout_mask),
}


@dataclass(frozen=True)
class MaskCase(TensorCase):
    """A mask [rows, columns] with p = 0.1."""

    rows: int
    columns: int

    functions = FUNCTIONS

    def tensors(
        self, precision: Precision, device: str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        return {"seed": torch.tensor(SEED + seed, device=device)}

    def exact(self, version: str, **inputs: Tensor) -> Tensor:
        return reference.dropout_mask(inputs["seed"], P, self.rows, self.columns).double()

    def check(
        self,
        version: str,
        got: Mapping[str, Tensor],
        exact: Mapping[str, Tensor],
        tolerance: float,
    ) -> float:
        if version != "torch":
            return super().check(version, got, exact, 0.0)
        off = abs(float(got["y"].double().mean()) - (1 - P))
        limit = 6 * (P * (1 - P) / exact["y"].numel()) ** 0.5  # six standard deviations
        if not off <= limit:
            raise GateError(f"the share kept is off by {off:.1e}, above {limit:.0e}")
        return off

    def shrunk(self) -> MaskCase:
        return replace(self, rows=13, columns=24)


SIZES = {
    "cpu": ((1600, 768), (4096, 64)),
    "cuda": ((64000, 768), (524288, 64), (8192, 4096)),
}
BENCHMARK = Benchmark(
    "dropout_mask",
    "Dropout masks",
    tuple(
        MaskCase("dropout_mask", group, f"{m}×{n}", m, n)
        for group, sizes in SIZES.items()
        for m, n in sizes
    ),
    {"all": tuple(FUNCTIONS)},
    floor="torch",
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
