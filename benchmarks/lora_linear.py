"""Times `lora_linear` beside its baselines, on the layers of the experiments and larger ones.

python -m benchmarks.lora_linear                                      # the CPU's cases
python -m benchmarks.lora_linear --device cuda --cases goal --precisions autocast tf32

Times are relative to a dense layer with the same shapes, dtype and gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark, Precision
from benchmarks.lib.lora_linear_versions import COMPILED, EAGER, ROUTES, VERSIONS
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import SCALING, SEED, TensorCase
from metalora import ops, reference


@dataclass(frozen=True)
class LayerCase(TensorCase):
    """One shape of a multi-task LoRA layer; ``rows`` are the rows of each task."""

    functions = VERSIONS

    in_features: int
    out_features: int
    rank: int
    rows: tuple[int, ...]
    dropout: float = 0.0

    @property
    def tasks(self) -> int:
        return len(self.rows)

    @property
    def equal(self) -> bool:
        return len(set(self.rows)) == 1

    @property
    def bounds(self) -> list[int]:
        """task_ptr as a list."""
        return [sum(self.rows[:t]) for t in range(self.tasks + 1)]

    def task_ptr(self) -> Tensor:
        return torch.tensor(self.bounds)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        total, inner, outer = sum(self.rows), self.in_features, self.out_features
        return {
            "x": (total, inner),
            "weight": (outer, inner),
            "bias": (outer,),
            "lora_A": (self.tasks, self.rank, inner),
            "lora_B": (self.tasks, outer, self.rank),
            "grad": (total, outer),
        }

    def without(self, version: str) -> tuple[str, ...]:
        return ("lora_A", "lora_B") if version.startswith("dense") else ()

    def exact(self, version: str, **inputs: Tensor) -> Tensor:
        if version.startswith("dense"):
            inputs["lora_B"] = torch.zeros_like(inputs["lora_B"])
        seed = torch.tensor(SEED, device=inputs["x"].device)
        return reference.lora_linear(
            **inputs,
            task_ptr=self.task_ptr(),
            scaling=SCALING,
            dropout_p=self.dropout,
            seed=seed,
        )

    def parts(self, name: str, result: Tensor) -> Sequence[Tensor]:
        if name in ("x", "y"):
            return result.split(list(self.rows))
        return result.unbind() if name.startswith("lora") else [result]

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        """The route that metalora takes."""
        x = torch.empty(1, self.in_features, device=device, dtype=precision.activations)
        weight = x.new_empty(self.out_features, self.in_features, dtype=precision.parameters)
        lora_A = weight.new_empty(self.tasks, self.rank, self.in_features)
        with precision.casting(device):
            choice = ops.lora_linear_route(
                x.expand(sum(self.rows), -1), weight, lora_A, dropout_p=self.dropout
            )
        return {"route": choice.route}

    def shrunk(self) -> LayerCase:
        """The same case with at most 24 features and 24 rows a task, to try the code on."""
        return replace(
            self,
            in_features=min(24, self.in_features),
            out_features=min(24, self.out_features),
            rank=min(8, self.rank),
            rows=tuple(min(24, n) for n in self.rows),
        )


_case = partial(LayerCase, "lora_linear")


def equal(tasks: int, in_features: int, out_features: int, rank: int, rows: int) -> LayerCase:
    name = f"T{tasks} {in_features}→{out_features} r{rank} {rows} rows/task"
    return _case("cpu", name, in_features, out_features, rank, (rows,) * tasks)


def ragged(in_features: int, out_features: int, rank: int, rows: tuple[int, ...]) -> LayerCase:
    name = f"T{len(rows)} {in_features}→{out_features} r{rank} ragged, {sum(rows)} rows"
    return _case("cpu", name, in_features, out_features, rank, rows)


def zipf(total: int, tasks: int) -> tuple[int, ...]:
    """Rows in proportion to 1, 1/2, 1/3, …; what rounding leaves goes to the first task."""
    weights = [1 / (t + 1) for t in range(tasks)]
    rows = [int(total * w / sum(weights)) for w in weights]
    return (rows[0] + total - sum(rows), *rows[1:])


def _roberta() -> Iterator[LayerCase]:
    """a: RoBERTa-base; L tokens a sequence, 160 sequences a task."""
    centre = ((768, 768), 40, 10, 8, 0.0)
    axes = (
        ((768, 768), (768, 3072), (3072, 768)),
        (40, 128),
        (10, 1, 4),
        (8, 1, 4, 16, 64),
        (0.0, 0.1),
    )
    for point in product(*axes):
        (inner, outer), length, tasks, rank, dropout = point
        name = f"a {inner}→{outer} L{length} T{tasks} r{rank}" + f" p{dropout}" * (dropout > 0)
        central = sum(p != c for p, c in zip(point, centre, strict=True)) <= 1
        yield _case(
            "a", name, inner, outer, rank, (160 * length,) * tasks, dropout, central=central
        )


def _large() -> Iterator[LayerCase]:
    """b: a large layer with few rows a task."""
    centre = (8192, 4, 16)
    for point in product((8192, 4096, 16384), (4, 16), (16, 64)):
        rows, tasks, rank = point
        name = f"b 4096→4096 {rows // 1024}k rows T{tasks} r{rank}"
        central = sum(p != c for p, c in zip(point, centre, strict=True)) <= 1
        yield _case("b", name, 4096, 4096, rank, (rows // tasks,) * tasks, central=central)


def _mixer() -> Iterator[LayerCase]:
    """c: the four layers of the paper's MLP-Mixer at 256 images a task."""
    shapes = ((512, 256, 16384), (256, 512, 16384), (64, 256, 131072), (256, 64, 131072))
    for inner, outer, rows in shapes:
        name = f"c {inner}→{outer} {rows} rows/task T4 r1"
        yield _case("c", name, inner, outer, 1, (rows,) * 4)


def _ragged() -> Iterator[LayerCase]:
    """Uneven splits of cases a and b."""
    for name, rows in (
        ("Zipf", zipf(64000, 10)),
        ("one empty task", (6400,) * 4 + (0,) + (6400,) * 5),
        ("one task of one row", (6400,) * 4 + (1,) + (6400,) * 5),
    ):
        yield _case("ragged", f"a 768→768 T10 r8 {name}", 768, 768, 8, rows)
    yield _case("ragged", "b 4096→4096 T16 r16 Zipf", 4096, 4096, 16, zipf(8192, 16))


def _routes() -> Iterator[LayerCase]:
    """From few to many rows a task: where the weight route overtakes the token route."""
    shapes = ((64, 64), (64, 256), (256, 64), (256, 256), (512, 256), (768, 768))
    for (inner, outer), rank, rows in product(shapes, (1, 8), (32, 128, 512, 2048)):
        yield replace(equal(4, inner, outer, rank, rows), group="routes")


def _small() -> Iterator[LayerCase]:
    """The same for layers whose rows stay in registers, on a CPU."""
    shapes = ((8, 8), (16, 16), (32, 32), (64, 64), (64, 10))
    for (inner, outer), tasks, rows in product(shapes, (8, 640), (1, 4, 16, 64)):
        yield replace(equal(tasks, inner, outer, 4, rows), group="small")


# From the paper's linear problem over its Mixer to a BERT-sized layer.
_CPU = (
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

CASES = (*_roberta(), *_large(), *_mixer(), *_ragged(), *_CPU, *_routes(), *_small())
# Where the weight route is to stay within 1.10 of the dense layer.
GOALS = tuple(c for c in CASES if c.group in "ac" and c.central and not c.dropout)
BENCHMARK = Benchmark(
    "lora_linear",
    "Multi-task LoRA layer, forward + backward",
    CASES,
    {"eager": tuple(EAGER), "routes": tuple(ROUTES), "compiled": tuple(COMPILED)},
    floor="dense",
    groups={"cpu": "cpu", "cuda": "goal"},
    goals=GOALS,
    can_freeze=True,
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
