"""Summary of a ratings run, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib.statistics import Comparison, compare, summarize, with_error

COLUMNS = (
    *("experiment", "method", "finetune", "tasks", "rank", "shots"),
    *("users", "trial", "metric", "value"),
)
KEY = ("method", "finetune", "tasks", "rank", "shots")
# Root mean squared errors: of all users alike, each one's mean over its held-out ratings first; and
# of all held-out ratings alike.
RMSE, OVER_RATINGS = "rmse", "rmse_over_ratings"
FORM = ".4f"
# What a line is compared with, in the order of the table's columns.
REFERENCES: Mapping[str, Mapping[str, str]] = {
    "standard": {"method": "standard"},
    "factors": {"method": "factors", "finetune": "", "rank": ""},
}


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns both errors after each retraining and fine-tuning, for each number of shots and T.

    ``rmse_vs_<reference>`` is a `Comparison` with standard retraining before the same fine-tuning,
    or with matrix factorisation; below zero the method is better. It is None where there is none.
    """
    rows = list(rows)
    lines = summarize(rows, KEY, (RMSE, OVER_RATINGS))
    values: dict[tuple[str, ...], dict[str, float]] = {}
    users: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["metric"] == RMSE:
            key = tuple(row[name] for name in KEY)
            values.setdefault(key, {})[row["trial"]] = float(row["value"])
            users.setdefault(key, set()).add(row["users"])
    for line in lines:
        key = tuple(line[name] for name in KEY)
        line["users"] = "-".join(sorted({min(users[key], key=int), max(users[key], key=int)}, key=int))
        for name, changed in REFERENCES.items():
            other = tuple({**line, **changed}[k] for k in KEY)
            line[f"{RMSE}_vs_{name}"] = (
                compare(values[key], values[other], lower_is_better=True)
                if other in values and other != key
                else None
            )
    return lines


def tables(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns the summary as text: a block for each number of retraining users and of shots."""
    lines = summary(rows)
    text = []
    for tasks, shots in dict.fromkeys((line["tasks"], line["shots"]) for line in lines):
        block = [line for line in lines if (line["tasks"], line["shots"]) == (tasks, shots)]
        trials, users = block[0]["trials"], block[0]["users"]
        text.append(
            f"{tasks} retraining users, {shots} shots ({users} users, "
            f"{trials} trial{'s' if trials != 1 else ''})"
        )
        text.append(
            f"{'retraining':<14} {'fine-tuning':<11} {'rank':>4} {'RMSE':>15} {'by ratings':>15}  "
            f"{'less standard before the same fine-tuning':<46}  less matrix factorisation"
        )
        text += [_text(line) for line in block]
        text.append("")
    text.append(
        "RMSE over unseen users: root of the mean over users of each user's mean squared error on "
        "held-out ratings (by ratings: of all their held-out ratings alike); mean (standard error) "
        "over trials; differences by trial with their 95 % interval, better below zero"
    )
    return "\n".join(text)


def _text(line: Mapping[str, Any]) -> str:
    cells = [with_error(line[m], line[f"{m}_se"], FORM) for m in (RMSE, OVER_RATINGS)]
    against = [_compared(line[f"{RMSE}_vs_{name}"]) for name in REFERENCES]
    return (
        f"{line['method']:<14} {line['finetune'] or '-':<11} {line['rank'] or '-':>4} "
        f"{cells[0]:>15} {cells[1]:>15}  {against[0]:<46}  {against[1]}"
    )


def _compared(found: Comparison | None) -> str:
    return "-" if found is None else found.text(FORM)
