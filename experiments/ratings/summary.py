"""Summary of a ratings run, and its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib.runs import RunFiles
from experiments.lib.statistics import compare, summarize, with_error
from experiments.lib.tables import NAMES, Table, difference
from experiments.ratings.settings import USER_BIAS

COLUMNS = (
    *("experiment", "method", "finetune", "tasks", "rank", "shots"),
    *("users", "trial", "metric", "value"),
)
KEY = ("method", "finetune", "tasks", "rank", "shots")
# Root mean squared errors: of all users alike, each one's mean over its held-out ratings first; and
# of all held-out ratings alike, which is in results.csv only.
RMSE, OVER_RATINGS = "rmse", "rmse_over_ratings"
# What a line is compared with: standard retraining before the same fine-tuning, or a baseline.
REFERENCES: Mapping[str, Mapping[str, str]] = {
    "standard": {"method": "standard"},
    "factors": {"method": "factors", "finetune": "", "rank": ""},
}
# Each method with the fine-tuning that it is made for.
PAIRS = (("lora-ml", "lora"), ("last-layer-ml", "last-layer"))
MOVIELENS_USERS = 943  # of runs whose manifest does not say how many there are
SHOWN = {
    **NAMES,
    "global-mean": "global mean",
    "biases": "user and item bias",
    "factors": "matrix factorisation",
    USER_BIAS: "user bias",
}
TITLES = {
    "method": "retraining",
    "finetune": "fine-tuning",
    "tasks": "users",
    "rank": "rank",
    "shots": "ratings",
}
COLUMN_TITLES = {"tasks": "{} users", "rank": "rank {}", "shots": "{}"}
_UNSEEN = "on unseen users' held-out ratings, for each number of ratings to fine-tune on"
_CORRECTED = "corrected for users that trials share"
_DIFFERENCE = (
    "{over}, paired by trial (below 0 is better){interval}, and in how many trials it is below 0."
)
_INTERVAL = f" [95 % interval, {_CORRECTED}]"
CAPTIONS = {
    RMSE: f"RMSE {_UNSEEN}: {{over}}{{error}}. All users count the same.",
    "standard": f"RMSE minus standard's with the same fine-tuning, {_UNSEEN}: {_DIFFERENCE}",
    "factors": f"RMSE minus matrix factorisation's, {_UNSEEN}: {_DIFFERENCE}",
}


def overlap_of(run: RunFiles) -> float:
    """Returns by how much intervals are widened because trials share users.

    It is the ``overlap`` of `experiments.lib.statistics.compare`: the test users over the other
    users whom a trial can draw. The fraction of their test users that two trials share on average
    does not depend on how many of the others they retrain on, nor does this number, which follows
    from it; with all of the others it is the ratio of test to retraining users that Nadeau and
    Bengio have. Where users with few ratings are left out, both kinds lose the same part of them.
    The validation users are the same in all trials: intervals are then of the trainings alone, 0.
    """
    settings = run.manifest["settings"]
    if settings.get("users") == "validation":
        return 0.0
    users = run.manifest.get("notes", {}).get("users", MOVIELENS_USERS)
    test: int = settings["test_users"]
    return test / (users - settings["validation_users"] - test)


def ends_counted(ends: Mapping[str, bool]) -> str:
    """Returns as a sentence what `experiments.ratings.decays.at_ends` has found, "" for nothing."""
    if not ends:
        return ""
    return f"{sum(ends.values())} of {len(ends)} chosen decays lie at an end of the grid."


def summary(rows: Iterable[Mapping[str, str]], overlap: float) -> list[dict[str, Any]]:
    """Returns the RMSE after each retraining and fine-tuning, for each number of shots and users.

    ``rmse_vs_<reference>`` is a `Comparison` with one of `REFERENCES`: below zero the line is
    better; None where there is none. ``users`` is the number of unseen users, or the least and the
    largest of the trials.

    Args:
        rows: of results.csv.
        overlap: see `overlap_of`.
    """
    rows = list(rows)
    lines = summarize(rows, KEY, (RMSE,))
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
                compare(values[key], values[other], lower_is_better=True, overlap=overlap)
                if other != key and values[key].keys() & values.get(other, {}).keys()
                else None
            )
    return lines


def results_tables(run: RunFiles) -> dict[str, Table]:
    """Returns the tables for the documentation.

    The main one has the RMSE. "standard" and "factors" have the differences to these, without the
    global mean and the biases per user, and with several numbers of users for `PAIRS` alone.
    """
    overlap = overlap_of(run)
    lines = summary(run.rows(), overlap)
    ends = ends_counted(run.manifest.get("notes", {}).get("at_ends", {}))
    compared = [
        line
        for line in lines
        if (line["method"], line["finetune"]) in PAIRS
        or (
            len(run.manifest["settings"]["tasks"]) == 1
            and line["method"] != "global-mean"
            and line["finetune"] != USER_BIAS
        )
    ]
    tables = {
        "": _by_shots(lines, RMSE, ends),
        **{name: _by_shots(compared, name, ends) for name in REFERENCES},
    }
    if overlap:
        return tables
    same = "over trials with the same users"
    return {
        name: dataclasses.replace(table, caption=table.caption.replace(_CORRECTED, same))
        for name, table in tables.items()
    }


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


def _by_shots(lines: Sequence[Mapping[str, Any]], name: str, ends: str) -> Table:
    """Makes the table of the RMSE, or of the differences to a reference.

    There is a column for each number of users, if there are several, or rank, or number of shots.
    ``ends`` is a sentence for the caption.
    """
    varied = [k for k in ("tasks", "rank") if len({line[k] for line in lines} - {""}) > 1]
    across, *others = [*varied, "shots"]
    key = ["method", "finetune", *others]
    columns = sorted({line[across] for line in lines}, key=lambda value: int(value or -1))
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        if name == RMSE:
            cell = with_error(line[RMSE], line[f"{RMSE}_se"], ".4f")
        else:
            found = line[f"{RMSE}_vs_{name}"]
            cells = difference(found, lambda value: f"{value:.4f}")
            cell = "" if found is None else ", ".join(cells)
        rows.setdefault(tuple(line[k] for k in key), {})[line[across]] = cell
    trials = sorted({str(line["trials"]) for line in lines}, key=int)
    users = {line["shots"]: line["users"] for line in lines}
    counted = ", ".join(f"{users[few]} at {few}" for few in sorted(users, key=int))
    cells_of = [
        [*(SHOWN.get(value, value or "–") for value in names), *(of.get(c, "") for c in columns)]
        for names, of in rows.items()
        if any(of.values())
    ]
    several = trials != ["1"]
    caption = CAPTIONS[name].format(
        over=f"mean of {' or '.join(trials)} trials" if several else "one trial, no error estimate",
        error=" (standard error)" if several else "",
        interval=_INTERVAL if several else "",
    )
    return Table(
        [*(TITLES[k] for k in key), *(COLUMN_TITLES[across].format(c or "–") for c in columns)],
        cells_of,
        f"{caption} Unseen users: {counted} ratings. {ends}".rstrip(),
        left=len(key),
    )
