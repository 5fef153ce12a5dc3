"""The rows of results.csv, and their values grouped for a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experiments.lib.statistics import compare
from experiments.lib.tables import AHEAD, DIFFERENCE, Table, difference, three_digits
from experiments.synthetic.settings import METHODS, Point


def row(
    experiment: str, point: Point, method: str, trial: int, metric: str, value: Any
) -> dict[str, Any]:
    """Returns a row of results.csv: one number of one trial."""
    return {
        "experiment": experiment,
        "vary": point.vary,
        "setting": point.value,
        "method": method,
        "trial": trial,
        "metric": metric,
        "value": float(value),
    }


def grouped(rows: Sequence[Mapping[str, str]]) -> dict[tuple[str, str, str], list[float]]:
    """Groups the trials' values by the point's name, the method and the metric."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for found in rows:
        key = (f"{found['vary']}={found['setting']}", found["method"], found["metric"])
        values.setdefault(key, []).append(float(found["value"]))
    return values


def comparison(
    rows: Sequence[Mapping[str, str]],
    metric: str,
    middle: Callable[[Sequence[float]], tuple[float, str]],
    caption: str,
    *,
    of_means: bool = True,
) -> Table:
    """Makes a table of LoRA-ML beside standard retraining, a line for each setting.

    Args:
        rows: of results.csv, those of each setting in the order of the trials.
        metric: an error, of which less is better.
        middle: returns what stands for the trials' values: a number, and the text to show.
        caption: see `Table`.
        of_means: whether the difference of the means, with its interval, has a column.
    """
    found = grouped(rows)
    lines = []
    for point in dict.fromkeys(name for name, _, _ in found):
        ours, standard = (found[point, method, metric] for method in METHODS)
        (low, shown), (high, other) = middle(ours), middle(standard)
        paired = compare(dict(enumerate(ours)), dict(enumerate(standard)), lower_is_better=True)
        ratio = f"{high / low:,.0f}" if high >= 100 * low else f"{high / low:.1f}"
        vary, _, value = point.partition("=")
        setting = f"{vary} = {int(value):,}"
        mean, ahead = difference(paired, three_digits)
        lines.append([setting, shown, other, ratio, *([mean] if of_means else []), ahead])
    header = ["setting", "LoRA-ML", "standard", "standard / LoRA-ML"]
    return Table([*header, *([DIFFERENCE] if of_means else []), AHEAD], lines, caption)
