"""The diagrams in numbers: how many trials recovered the truth, and how many were unfinished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.lib.tables import Table

METRICS = ("relative_error", "remaining_loss", "late_progress")
# A training is finished when its loss is this part of its first one, or when the last tenth of its
# steps lowered the loss by no more than this part of it.
LEAST_LOSS, LEAST_PROGRESS = 1e-10, 0.01
UNFINISHED = "†"


@dataclass(frozen=True)
class Cell:
    """Fractions of a cell's trials.

    Attributes:
        success: that recovered the truth.
        unfinished: that did not, and whose loss was still falling.
    """

    success: float
    unfinished: float


Cells = dict[tuple[int, int], Cell]  # by T or n, and k


def cells(diagram: str, tolerance: float, rows: Sequence[Mapping[str, str]]) -> Cells:
    """Returns the diagram over T or n, from the rows of results.csv."""
    values: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in rows:
        if row["vary"] == diagram:
            metrics = values.setdefault((int(row["setting"]), int(row["k"])), {})
            metrics.setdefault(row["metric"], []).append(float(row["value"]))
    found = {}
    for place, metrics in values.items():
        success = [error <= tolerance for error in metrics["relative_error"]]
        unfinished = [
            not done and loss > LEAST_LOSS and progress > LEAST_PROGRESS
            for done, loss, progress in zip(
                success, metrics["remaining_loss"], metrics["late_progress"], strict=True
            )
        ]
        found[place] = Cell(sum(success) / len(success), sum(unfinished) / len(success))
    return found


def table(diagram: str, found: Cells) -> str:
    """Returns success in percent, the largest rank first; † marks unfinished trials."""
    columns = sorted({value for value, _ in found})
    lines = [f"{diagram + ' =':>7}" + "".join(f"{value:>6}" for value in columns)]
    for rank in sorted({rank for _, rank in found}, reverse=True):
        row = [found[value, rank] for value in columns]
        texts = [f"{100 * c.success:.0f}{UNFINISHED if c.unfinished else ' '}" for c in row]
        lines.append(f"{f'k = {rank}':>7}" + "".join(f"{text:>6}" for text in texts))
    return "\n".join(lines)


def results_table(diagram: str, found: Cells) -> Table:
    """Returns the same for the documentation."""
    columns = sorted({value for value, _ in found})
    lines = []
    for rank in sorted({rank for _, rank in found}, reverse=True):
        row = [found[value, rank] for value in columns]
        shown = [f"{100 * c.success:.0f}{UNFINISHED if c.unfinished else ''}" for c in row]
        lines.append([f"k = {rank}", *shown])
    caption = (
        f"Percent of trials in which the truth was recovered; {UNFINISHED} marks cells in which "
        "the loss of some that failed was still falling."
    )
    return Table(["", *(f"{diagram} = {value}" for value in columns)], lines, caption)
