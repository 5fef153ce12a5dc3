"""Times `lora_linear_symmetric` beside plain PyTorch, on equally many rows for each task.

python -m benchmarks.lora_linear_symmetric [--device cuda] [--write DIR]

Times are relative to every W + U_t U_tᵀ formed and one batched product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, OperatorCase, Setup
from metalora import ops


def _plain(x: Tensor, weight: Tensor, lora_U: Tensor) -> Tensor:
    merged = torch.baddbmm(weight.unsqueeze(0), lora_U, lora_U.mT)
    return torch.bmm(x.view(lora_U.shape[0], -1, x.shape[1]), merged.mT).flatten(0, 1)


def _layer(route: str) -> Callable[[Setup], Function]:
    def make(setup: Setup) -> Function:
        tasks, rows = setup.case.sizes["lora_U"][0], setup.case.sizes["x"][0]
        task_ptr = torch.arange(tasks + 1) * (rows // tasks)

        def layer(x: Tensor, weight: Tensor, lora_U: Tensor) -> Tensor:
            return ops.lora_linear_symmetric(x, weight, None, lora_U, task_ptr, route=route)

        return layer

    return make


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {
    "plain": lambda setup: _plain,
    "metalora": _layer("auto"),
    "metalora-weight": _layer("weight"),
}


def _case(group: str, tasks: int, dim: int, rows: int, rank: int) -> OperatorCase:
    shapes = {"x": (tasks * rows, dim), "weight": (dim, dim), "lora_U": (tasks, dim, rank)}
    name = f"T{tasks} {dim}→{dim} k{rank} {rows} rows/task"
    shapes["grad"] = shapes["x"]
    return OperatorCase("lora_linear_symmetric", group, name, shapes, FUNCTIONS, _plain)


# Tasks, features, rows of a task, rank.
SIZES = {
    "cpu": ((3, 10, 1000, 1), (5, 20, 1000, 3), (4, 256, 1024, 4)),
    "cuda": ((3, 10, 5000, 1), (10, 64, 10000, 3), (10, 768, 6400, 8)),
}
BENCHMARK = Benchmark(
    "lora_linear_symmetric",
    "Multi-task layer with symmetric adapters, forward + backward",
    tuple(_case(group, *sizes) for group, several in SIZES.items() for sizes in several),
    {"all": tuple(FUNCTIONS)},
    floor="plain",
    precisions=("fp32", "fp64"),
    can_freeze=True,
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
