"""Summary of a ratings run, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib.statistics import compare, summarize, with_error
from experiments.lib.tables import NAMES, Table, difference

COLUMNS = (
    *("experiment", "method", "finetune", "tasks", "rank", "shots"),
    *("users", "trial", "metric", "value"),
)
KEY = ("method", "finetune", "tasks", "rank", "shots")
# Root mean squared errors: of all users alike, each one's mean over its held-out ratings first; and
# of all held-out ratings alike.
RMSE, OVER_RATINGS = "rmse", "rmse_over_ratings"
# What a line is compared with: standard retraining before the same fine-tuning, or a baseline.
REFERENCES: Mapping[str, Mapping[str, str]] = {
    "standard": {"method": "standard"},
    "biases": {"method": "biases", "finetune": "", "rank": ""},
    "factors": {"method": "factors", "finetune": "", "rank": ""},
}
SHOWN = {
    **NAMES,
    "global-mean": "global mean",
    "biases": "user and item bias",
    "factors": "matrix factorisation",
    "user-bias": "user bias",
}
TITLES = {"method": "retraining", "finetune": "fine-tuning", "tasks": "users", "rank": "rank"}
_UNSEEN = "RMSE of unseen users' held-out ratings, a column for each number of shots: over {trials}"
_MEAN = f"{_UNSEEN} trials the mean (standard error)."
_DIFFERENCE = (
    "trials the mean difference, by trial, to {0} [95 % interval], below zero where better, and in "
    "how many trials it is."
)
CAPTIONS = {
    RMSE: f"{_MEAN} It is the root of the mean over users of each user's mean squared error, so "
    "that every user counts the same.",
    OVER_RATINGS: f"{_MEAN} All held-out ratings count the same.",
    "standard": f"{_UNSEEN} "
    + _DIFFERENCE.format("standard retraining before the same fine-tuning"),
    "biases": f"{_UNSEEN} {_DIFFERENCE.format('biases of users and items')}",
    "factors": f"{_UNSEEN} {_DIFFERENCE.format('matrix factorisation')}",
}


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns both errors after each retraining and fine-tuning, for each number of shots and T.

    ``rmse_vs_<reference>`` is a `Comparison` with one of `REFERENCES`: below zero the line is
    better; None where there is none. ``users`` is the number of unseen users, or the least and the
    largest of the trials.
    """
    rows = list(rows)
    lines = summarize(rows, KEY, (RMSE, OVER_RATINGS))
    values: dict[tuple[str, ...], dict[str, float]] = {}
    users: dict[tuple[str, ...], set[int]] = {}
    for row in rows:
        if row["metric"] == RMSE:
            key = tuple(row[name] for name in KEY)
            values.setdefault(key, {})[row["trial"]] = float(row["value"])
            users.setdefault(key, set()).add(int(row["users"]))
    for line in lines:
        key = tuple(line[name] for name in KEY)
        numbers = users[key]
        line["users"] = "-".join(str(n) for n in sorted({min(numbers), max(numbers)}))
        for name, changed in REFERENCES.items():
            other = tuple({**line, **changed}[k] for k in KEY)
            line[f"{RMSE}_vs_{name}"] = (
                compare(values[key], values[other], lower_is_better=True)
                if other != key and values[key].keys() & values.get(other, {}).keys()
                else None
            )
    return lines


def results_tables(rows: Sequence[Mapping[str, str]]) -> dict[str, Table]:
    """Returns the tables for the documentation, with a column for each number of shots.

    The main one has the RMSE of every user alike; "rmse_over_ratings" has that of every rating
    alike; "standard", "biases" and "factors" have the differences to these.
    """
    lines = summary(rows)
    tables = {name: _by_shots(lines, name) for name in (RMSE, OVER_RATINGS, *REFERENCES)}
    return {"" if name == RMSE else name: table for name, table in tables.items()}


def as_text(tables: Iterable[Table]) -> str:
    """Returns tables as text, each with its caption below."""
    parts = []
    for table in tables:
        widths = [max(map(len, cells)) for cells in zip(table.header, *table.rows, strict=True)]
        for cells in (table.header, *table.rows):
            padded = [
                cell.ljust(width) if place < table.left else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            parts.append("  ".join(padded).rstrip())
        parts += [table.caption, ""]
    return "\n".join(parts).rstrip()


def _by_shots(lines: Sequence[Mapping[str, Any]], name: str) -> Table:
    """Makes the table of a metric, or of the differences to a reference.

    Numbers of retraining users and ranks have columns if there are several.
    """
    several = [k for k in ("tasks", "rank") if len({line[k] for line in lines} - {""}) > 1]
    key = ["method", "finetune", *several]
    shots = sorted({line["shots"] for line in lines}, key=int)
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        if name in CAPTIONS and name not in REFERENCES:
            cell = with_error(line[name], line[f"{name}_se"], ".4f")
        else:
            found = line[f"{RMSE}_vs_{name}"]
            cells = difference(found, lambda value: f"{value:.4f}")
            cell = "" if found is None else ", ".join(cells)
        rows.setdefault(tuple(line[k] for k in key), {})[line["shots"]] = cell
    trials = sorted({str(line["trials"]) for line in lines}, key=int)
    users = {line["shots"]: line["users"] for line in lines}
    counted = ", ".join(f"{users[few]} at {few}" for few in shots)
    cells_of = [
        [*(SHOWN.get(value, value or "–") for value in names), *(of.get(few, "") for few in shots)]
        for names, of in rows.items()
        if any(of.values())
    ]
    caption = CAPTIONS[name].format(trials=" or ".join(trials))
    return Table(
        [*(TITLES[k] for k in key), *shots],
        cells_of,
        f"{caption} Unseen users: {counted} shots.",
        left=len(key),
    )
