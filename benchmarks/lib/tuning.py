"""What the CUDA kernels are launched with: reads and writes csrc/cuda/tuning_table.h."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from metalora._files import replacing

TABLE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "tuning_table.h"
_ROW = re.compile(r"\{Tuned::(\w+), (\d+), (\w+), (\d+), (\d+)\},")
_ANY = "kAnyRank"


@dataclass(frozen=True)
class Row:
    """One choice; csrc/cuda/tuning.h says what the numbers mean.

    Attributes:
        what: a kernel's file, or "product_plan".
        element: bytes of an element.
        rank: the largest rank that the row is for; infinite for any.
        blocks, depth: the choice.
    """

    what: str
    element: int
    rank: float
    blocks: int
    depth: int

    @property
    def name(self) -> str:
        ranks = "" if math.isinf(self.rank) else f", ranks up to {self.rank:.0f}"
        return f"{self.what}, {self.element} bytes{ranks}"

    @property
    def choice(self) -> tuple[int, int]:
        return self.blocks, self.depth


def read_table(path: Path = TABLE) -> tuple[Row, ...]:
    """The rows, in order."""
    found = _ROW.findall(path.read_text(encoding="utf-8"))
    return tuple(
        Row(what, int(element), math.inf if rank == _ANY else int(rank), int(blocks), int(depth))
        for what, element, rank, blocks, depth in found
    )


def write_table(path: Path, rows: Sequence[Row], measured_on: str) -> None:
    """Replaces the numbers of the file's rows; ``measured_on`` takes the place of what it says."""
    text = TABLE.read_text(encoding="utf-8")
    lines = []
    for row in rows:
        rank = _ANY if math.isinf(row.rank) else f"{row.rank:.0f}"
        numbers = f"{row.element}, {rank}, {row.blocks}, {row.depth}"
        lines.append(f"    {{Tuned::{row.what}, {numbers}}},\n")
    start = text.index("    {Tuned::")
    head = re.sub(r"(// Measured on: ).*", rf"\g<1>{measured_on}.", text[:start])
    with replacing(path) as file:
        file.write((head + "".join(lines)).encode())


def chosen(what: str, element: int, rank: int = 1) -> Row:
    """The row that the kernels take: `tuned` of csrc/cuda/tuning.cpp."""
    rows = _table()
    return next(r for r in rows if r.what == what and r.element == element and rank <= r.rank)


@functools.cache
def _table() -> tuple[Row, ...]:
    return read_table()
