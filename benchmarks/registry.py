"""The cases that the operators are measured on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One shape of a multi-task LoRA layer; ``rows`` are the rows of each task."""

    name: str
    in_features: int
    out_features: int
    rank: int
    rows: tuple[int, ...]

    @property
    def tasks(self) -> int:
        return len(self.rows)

    @property
    def equal(self) -> bool:
        return len(set(self.rows)) == 1

    def tensors(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Random x, weight, bias, lora_A, lora_B that need grad, and the gradient of y."""
        generator = torch.Generator().manual_seed(0)
        total, tasks = sum(self.rows), self.tasks
        shapes = [
            (total, self.in_features),
            (self.out_features, self.in_features),
            (self.out_features,),
            (tasks, self.rank, self.in_features),
            (tasks, self.out_features, self.rank),
            (total, self.out_features),
        ]
        made = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
        return [t.requires_grad_() for t in made[:-1]] + made[-1:]

    def task_ptr(self) -> Tensor:
        return torch.tensor([0, *self.rows]).cumsum(0)


def equal(tasks: int, in_features: int, out_features: int, rank: int, rows: int) -> Case:
    name = f"T{tasks} {in_features}→{out_features} r{rank} {rows} rows/task"
    return Case(name, in_features, out_features, rank, (rows,) * tasks)


def ragged(in_features: int, out_features: int, rank: int, rows: tuple[int, ...]) -> Case:
    name = f"T{len(rows)} {in_features}→{out_features} r{rank} ragged, {sum(rows)} rows"
    return Case(name, in_features, out_features, rank, rows)


# From the paper's linear problem over its Mixer to a BERT-sized layer.
CPU_CASES = (
    equal(3, 10, 10, 1, 100),
    equal(3, 20, 20, 3, 100),
    equal(4, 64, 64, 1, 256),
    equal(10, 128, 128, 4, 100),
    ragged(128, 128, 4, (400, 200, 130, 100, 80, 60, 20, 9, 1, 0)),
    equal(4, 512, 256, 1, 1024),
    equal(4, 64, 256, 1, 4096),
    equal(10, 384, 384, 8, 160),
    equal(10, 768, 768, 8, 160),
    ragged(768, 768, 8, (640, 320, 210, 160, 120, 90, 40, 19, 1, 0)),
)
