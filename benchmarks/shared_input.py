"""Times three layers that read the same input, as for queries, keys and values.

python -m benchmarks.shared_input [--device cuda] [--write DIR]

"metalora" hands the input on from layer to layer, as layers on a GPU do; "metalora-alone" does not.
Under autocast the input is in float32, as a normalisation leaves it. Times are relative to every
W + B_t A_t formed in plain PyTorch and batched products.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, OperatorCase, Setup
from metalora import ops
from metalora.ops.lora_linear import lora_linear_handing_on

LAYERS = 3


def _plain(hidden: Tensor, weights: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    tasks, outputs = lora_A.shape[1], []
    for weight, A, B in zip(weights, lora_A, lora_B, strict=True):
        with torch.autocast(hidden.device.type, enabled=False):  # W is rounded once B A is in
            merged = torch.baddbmm(weight.unsqueeze(0), B, A)
        outputs.append(torch.bmm(hidden.view(tasks, -1, hidden.shape[1]), merged.mT))
    return torch.cat(outputs).flatten(0, 1)


def _layers(hands_on: bool) -> Callable[[Setup], Function]:
    def make(setup: Setup) -> Function:
        tasks, rows = setup.case.sizes["lora_A"][1], setup.case.sizes["hidden"][0]
        task_ptr = torch.arange(tasks + 1) * (rows // tasks)

        def layers(hidden: Tensor, weights: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
            outputs, x = [], hidden
            # One node of autograd for all: each would fill a gradient of the whole with zeros.
            each = zip(weights.unbind(), lora_A.unbind(), lora_B.unbind(), strict=True)
            for weight, A, B in each:
                if hands_on:
                    y, x = lora_linear_handing_on(x, weight, None, A, B, task_ptr)
                else:
                    y = ops.lora_linear(hidden, weight, None, A, B, task_ptr)
                outputs.append(y)
            return torch.cat(outputs)

        return layers

    return make


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {
    "plain": lambda setup: _plain,
    "metalora": _layers(True),
    "metalora-alone": _layers(False),
}


class ProjectionsCase(OperatorCase):
    """An `OperatorCase` that stays one when it is shrunk."""

    def shrunk(self) -> ProjectionsCase:
        small = super().shrunk().sizes
        rows = small["lora_A"][1] * 4
        sizes = {
            **small,
            "hidden": (rows, small["hidden"][1]),
            "grad": (LAYERS * rows, small["grad"][1]),
        }
        return replace(self, sizes=sizes)


def _case(group: str, tasks: int, features: int, rows: int, rank: int) -> ProjectionsCase:
    total = tasks * rows
    shapes = {
        "hidden": (total, features),
        "weights": (LAYERS, features, features),
        "lora_A": (LAYERS, tasks, rank, features),
        "lora_B": (LAYERS, tasks, features, rank),
        "grad": (LAYERS * total, features),
    }
    name = f"T{tasks} {features}→3·{features} r{rank} {rows} rows/task"
    return ProjectionsCase("lora_linear", group, name, shapes, FUNCTIONS, _plain)


# Tasks, features, rows of a task, rank.
SIZES = {
    "cpu": ((4, 384, 960, 8), (4, 384, 240, 8)),
    "cuda": ((10, 768, 6400, 8), (4, 768, 20480, 8), (4, 4096, 2048, 16)),
}
BENCHMARK = Benchmark(
    "shared_input",
    "Three layers that read the same input, forward + backward",
    tuple(_case(group, *sizes) for group, several in SIZES.items() for sizes in several),
    {"all": tuple(FUNCTIONS)},
    floor="plain",
    precisions=("autocast", "fp32"),
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
