"""Random problems, and an oracle that shares no code with metalora."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# name -> rows of each task
SPLITS = {
    "equal": (6, 6, 6),
    "ragged": (5, 0, 71, 14),
    "one_task": (17,),
    "all_in_one": (0, 23, 0),
    "one_row": (1, 40, 1),
    "more_tasks_than_rows": (1, 0, 0, 1, 0),
    "no_rows": (0, 0),
    "long": (130, 300),
}
# in, out, rank: multiples of nothing, vectors' edges, above and below the small-layer kernels
SIZES = (
    (1, 1, 1),
    (10, 2, 1),
    (3, 3, 2),
    (7, 5, 3),
    (8, 16, 2),
    (10, 10, 1),
    (32, 32, 4),
    (33, 31, 5),
    (48, 64, 3),
    (64, 33, 2),
    (65, 40, 9),
)


@dataclass
class Problem:
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    task_ptr: Tensor
    rows: tuple[int, ...]

    @property
    def tensors(self) -> list[Tensor | None]:
        return [self.x, self.weight, self.bias, self.lora_A, self.lora_B]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in self.tensors if t is not None]


def problem(
    rows: tuple[int, ...] = SPLITS["ragged"],
    sizes: tuple[int, int, int] = (7, 5, 3),
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    grad: bool = True,
) -> Problem:
    in_features, out_features, rank = sizes
    total, tasks = sum(rows), len(rows)
    made = Problem(
        torch.randn(total, in_features, dtype=dtype),
        torch.randn(out_features, in_features, dtype=dtype),
        torch.randn(out_features, dtype=dtype) if bias else None,
        torch.randn(tasks, rank, in_features, dtype=dtype),
        torch.randn(tasks, out_features, rank, dtype=dtype),
        torch.tensor([0, *rows]).cumsum(0),
        rows,
    )
    if grad:
        for leaf in made.leaves:
            leaf.requires_grad_()
    return made


def oracle(p: Problem, scaling: float, keep: Tensor | None = None, drop_p: float = 0.0) -> Tensor:
    """Every row with its own weight, by einsum."""
    task = torch.repeat_interleave(torch.arange(len(p.rows)), torch.tensor(p.rows))
    update = torch.einsum("tor,tri->toi", p.lora_B, p.lora_A)[task]
    branch = p.x if keep is None else p.x * keep / (1 - drop_p)
    y = torch.einsum("mi,oi->mo", p.x, p.weight)
    y = y + scaling * torch.einsum("mi,moi->mo", branch, update)
    return y if p.bias is None else y + p.bias


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """‖got − wanted‖ / ‖wanted‖, with a non-finite difference counted as infinite."""
    difference = (got.double() - wanted.double()).norm().item()
    if difference != difference:
        return float("inf")
    return difference / max(wanted.double().norm().item(), 1e-300) if difference else 0.0
