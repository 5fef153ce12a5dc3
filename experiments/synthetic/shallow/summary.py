"""Medians over the trials, and a table per sweep."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.lib.tables import Table
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.summary import comparison, grouped

METRICS = ("prediction_error", "held_out_error", "retrain_loss", "finetune_loss")


@dataclass(frozen=True)
class Summary:
    """A metric over the trials of one point: the median and the range of the central 6 in 10."""

    median: float
    low: float
    high: float


Summaries = Mapping[tuple[str, str, str], Summary]  # by the point's name, method, metric


def summarise(rows: Sequence[Mapping[str, str]]) -> Summaries:
    """Summarises every metric, by the point's name, the method and the metric."""
    return {key: _summary(values) for key, values in grouped(rows).items()}


def _summary(values: Sequence[float]) -> Summary:
    ordered = sorted(values)
    outside = len(ordered) // 5  # on either side
    central = ordered[outside : len(ordered) - outside]
    return Summary(statistics.median(ordered), central[0], central[-1])


def tables(points: Sequence[Point], summaries: Summaries) -> str:
    """Returns a Markdown table per sweep: median, and the range of the central 6 of 10 trials."""
    parts = []
    for vary in dict.fromkeys(point.vary for point in points):
        lines = [
            f"| {vary} | LoRA-ML | standard | standard / LoRA-ML | LoRA-ML, fresh inputs "
            "| standard, fresh inputs |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for point in (p for p in points if p.vary == vary):
            cells = [
                summaries[point.name, method, metric]
                for metric in METRICS[:2]
                for method in METHODS
            ]
            ratio = cells[1].median / cells[0].median
            texts = [f"{c.median:.3g} ({c.low:.3g} to {c.high:.3g})" for c in cells]
            row = [f"{point.value:,}", *texts[:2], f"{ratio:.1f}", *texts[2:]]
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def results_table(rows: Sequence[Mapping[str, str]], metric: str, what: str) -> Table:
    """Returns a table of all sweeps for the documentation.

    Args:
        rows: of results.csv.
        metric: one of the prediction errors.
        what: says what it is measured on.
    """
    caption = (
        f"Mean squared error against the noiseless outputs of the test task, {what}: median over "
        "the trials, and the range of the central six in ten; the ratio is that of the medians. "
        "LoRA-ML is ahead in a trial if its error is the lower one."
    )
    return comparison(rows, metric, _median_and_range, caption, of_means=False)


def _median_and_range(values: Sequence[float]) -> tuple[float, str]:
    found = _summary(values)
    return found.median, f"{found.median:.3g} ({found.low:.3g} to {found.high:.3g})"
