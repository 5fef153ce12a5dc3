"""The cases and precisions that the multi-task LoRA layer is measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from metalora._checks import did_you_mean

SCALING = 0.5
INPUTS = ("x", "weight", "bias", "lora_A", "lora_B")


@dataclass(frozen=True)
class Precision:
    """Dtypes of a measurement, and the relative error ‖got - exact‖ / ‖exact‖ that they allow."""

    name: str
    parameters: torch.dtype
    activations: torch.dtype
    tolerance: float
    autocast: bool = False
    tf32: bool = False

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Sets how float32 products are computed."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def casting(self, device: str) -> contextlib.AbstractContextManager[object]:
        """What a forward pass runs under."""
        if self.autocast:
            return torch.autocast(device, dtype=self.activations)
        return contextlib.nullcontext()


_BF16, _FP32, _FP64 = torch.bfloat16, torch.float32, torch.float64
PRECISIONS = {
    p.name: p
    for p in (
        Precision("autocast", _FP32, _BF16, 1e-2, autocast=True),
        Precision("tf32", _FP32, _FP32, 2e-3, tf32=True),
        Precision("bf16", _BF16, _BF16, 1e-2),
        Precision("fp32", _FP32, _FP32, 5e-5),
        Precision("fp64", _FP64, _FP64, 1e-12),
    )
}


@dataclass(frozen=True)
class Case:
    """One shape of a multi-task LoRA layer; ``rows`` are the rows of each task.

    ``central``: at most one of its sizes is not the one its group is built around.
    """

    group: str
    name: str
    in_features: int
    out_features: int
    rank: int
    rows: tuple[int, ...]
    dropout: float = 0.0
    central: bool = True

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

    def tensors(self, precision: Precision, device: str = "cpu", seed: int = 0) -> list[Tensor]:
        """Random x, weight, bias, lora_A, lora_B, and the gradient of y."""
        generator = torch.Generator(device).manual_seed(seed)
        total, tasks, rank = sum(self.rows), self.tasks, self.rank
        inner, outer = self.in_features, self.out_features
        small, large = precision.activations, precision.parameters
        shapes: list[tuple[tuple[int, ...], float, torch.dtype]] = [
            ((total, inner), 1, small),
            ((outer, inner), inner**-0.5, large),
            ((outer,), 1, large),
            ((tasks, rank, inner), inner**-0.5, large),
            ((tasks, outer, rank), rank**-0.5, large),
            ((total, outer), 1, small),
        ]
        return [
            torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale)
            for shape, scale, dtype in shapes
        ]

    def shrunk(self) -> Case:
        """The same case with at most 24 features and 24 rows a task, to try the code on."""
        return replace(
            self,
            in_features=min(24, self.in_features),
            out_features=min(24, self.out_features),
            rank=min(8, self.rank),
            rows=tuple(min(24, n) for n in self.rows),
        )


def equal(tasks: int, in_features: int, out_features: int, rank: int, rows: int) -> Case:
    name = f"T{tasks} {in_features}→{out_features} r{rank} {rows} rows/task"
    return Case("cpu", name, in_features, out_features, rank, (rows,) * tasks)


def ragged(in_features: int, out_features: int, rank: int, rows: tuple[int, ...]) -> Case:
    name = f"T{len(rows)} {in_features}→{out_features} r{rank} ragged, {sum(rows)} rows"
    return Case("cpu", name, in_features, out_features, rank, rows)


def zipf(total: int, tasks: int) -> tuple[int, ...]:
    """Rows in proportion to 1, 1/2, 1/3, …; what rounding leaves goes to the first task."""
    weights = [1 / (t + 1) for t in range(tasks)]
    rows = [int(total * w / sum(weights)) for w in weights]
    return (rows[0] + total - sum(rows), *rows[1:])


def _roberta() -> Iterator[Case]:
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
        yield Case("a", name, inner, outer, rank, (160 * length,) * tasks, dropout, central)


def _large() -> Iterator[Case]:
    """b: a large layer with few rows a task."""
    centre = (8192, 4, 16)
    for point in product((8192, 4096, 16384), (4, 16), (16, 64)):
        rows, tasks, rank = point
        name = f"b 4096→4096 {rows // 1024}k rows T{tasks} r{rank}"
        central = sum(p != c for p, c in zip(point, centre, strict=True)) <= 1
        yield Case("b", name, 4096, 4096, rank, (rows // tasks,) * tasks, central=central)


def _mixer() -> Iterator[Case]:
    """c: the four layers of the paper's MLP-Mixer at 256 images a task."""
    shapes = ((512, 256, 16384), (256, 512, 16384), (64, 256, 131072), (256, 64, 131072))
    for inner, outer, rows in shapes:
        yield Case("c", f"c {inner}→{outer} {rows} rows/task T4 r1", inner, outer, 1, (rows,) * 4)


def _ragged() -> Iterator[Case]:
    """Uneven splits of cases a and b."""
    for name, rows in (
        ("Zipf", zipf(64000, 10)),
        ("one empty task", (6400,) * 4 + (0,) + (6400,) * 5),
        ("one task of one row", (6400,) * 4 + (1,) + (6400,) * 5),
    ):
        yield Case("ragged", f"a 768→768 T10 r8 {name}", 768, 768, 8, rows)
    yield Case("ragged", "b 4096→4096 T16 r16 Zipf", 4096, 4096, 16, zipf(8192, 16))


def _routes() -> Iterator[Case]:
    """From few to many rows a task: where the weight route overtakes the token route."""
    shapes = ((64, 64), (64, 256), (256, 64), (256, 256), (512, 256), (768, 768))
    for (inner, outer), rank, rows in product(shapes, (1, 8), (32, 128, 512, 2048)):
        yield replace(equal(4, inner, outer, rank, rows), group="routes")


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

CASES = (*_roberta(), *_large(), *_mixer(), *_ragged(), *_CPU, *_routes())
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))
# Where the weight route is to stay within 1.10 of the dense layer.
GOAL = tuple(c for c in CASES if c.group in "ac" and c.central and not c.dropout)


def select(words: Sequence[str]) -> list[Case]:
    """The cases that these words name, in their order, each once.

    ``a`` is the central cases of group a, ``a/all`` every one of them, ``goal`` those with a goal;
    anything else is a case's full name.

    Raises:
        ValueError: for a word that names nothing.
    """
    found: list[Case] = []
    for word in words:
        group, _, every = word.partition("/")
        if word == "goal":
            found += GOAL
        elif group in GROUPS and every in ("", "all"):
            found += [c for c in CASES if c.group == group and (every or c.central)]
        else:
            known = {c.name: c for c in CASES}
            if word not in known:
                hint = did_you_mean(word, [*GROUPS, "goal", *known])
                raise ValueError(f"no case and no group of cases is called {word!r}{hint}")
            found.append(known[word])
    return list(dict.fromkeys(found))
