"""Times `task_matvec`, every task's own small weight or W + U_t U_tᵀ, beside plain PyTorch.

python -m benchmarks.task_matvec [--device cuda] [--write DIR]

Times are relative to torch's batched products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, OperatorCase, Setup
from metalora import ops, reference


def _merged(weight: Tensor, x: Tensor, *lora_U: Tensor) -> Tensor:
    """Every W_t = W + U_t U_tᵀ formed, then one batched product."""
    for factors in lora_U:
        weight = torch.baddbmm(weight.unsqueeze(0), factors, factors.mT)
    return torch.bmm(x, weight.mT)


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {
    "plain": lambda setup: reference.task_matvec,
    "metalora": lambda setup: ops.task_matvec,
    "merged": lambda setup: _merged,
}


def _case(group: str, tasks: int, dim: int, samples: int, rank: int) -> OperatorCase:
    """Rank 0 is a weight for each task, above it one W and U_t."""
    weight, x = (dim, dim) if rank else (tasks, dim, dim), (tasks, samples, dim)
    shapes = {"weight": weight, "x": x, **({"lora_U": (tasks, dim, rank)} if rank else {})}
    name = f"T{tasks} d{dim} n{samples} " + (f"W + U Uᵀ, k{rank}" if rank else "W_t")
    exact, shapes = reference.task_matvec, {**shapes, "grad": x}
    return OperatorCase("task_matvec", group, name, shapes, FUNCTIONS, exact)


# Tasks, features, samples of a task, and the rank of the symmetric form.
SIZES = {
    "cpu": ((3, 10, 100, 1), (3, 10, 5000, 1), (5, 20, 1000, 3), (10, 64, 1000, 3)),
    "cuda": ((3, 10, 5000, 1), (1000, 10, 100, 1), (10, 64, 10000, 3)),
}
BENCHMARK = Benchmark(
    "task_matvec",
    "Matrix-vector products of all tasks, forward + backward",
    tuple(
        _case(group, tasks, dim, samples, rank)
        for group, sizes in SIZES.items()
        for tasks, dim, samples, k in sizes
        for rank in (0, k)
    ),
    {"all": tuple(FUNCTIONS)},
    floor="plain",
    precisions=("fp32", "fp64"),
    can_freeze=True,
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
