"""The rows of results.csv, and their values grouped for a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.synthetic.settings import Point


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
