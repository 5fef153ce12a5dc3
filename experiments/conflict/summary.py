"""Summary of a conflict run, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.conflict.settings import WITH_TASKS
from experiments.lib.statistics import Line, summarize, with_error
from experiments.lib.tables import Table, compared, side_by_side

ACCURACY, VALIDATION, RATE = "accuracy", "validation", "learning_rate"
RETRAINING = "validation_last"
RETRAINING_TASKS = "retraining"  # the name of their table
HEADS = "last-layer-ml"  # the method with a head per task alone
COLUMNS = (
    "experiment",
    "data",
    "pairs",
    "inputs",
    "flipped",
    "method",
    "batch_size",
    "retrain_lr",
    "finetune",
    "shots",
    "trial",
    "metric",
    "value",
)
KEY = ("pairs", "inputs", "flipped", "method", "batch_size", "retrain_lr", "finetune", "shots")
TITLES = {
    "pairs": "pairs     ",
    "inputs": "inputs  ",
    "flipped": "flipped",
    "method": "retraining          ",
    "batch_size": "batch",
    "retrain_lr": "rate  ",
    "finetune": "fine-tuning",
    "shots": "shots",
    "trials": "trials",
}


def summary(rows: Iterable[Mapping[str, str]], metric: str = "") -> list[Line]:
    """Returns a metric in percent for each line of the table, compared with standard retraining.

    Args:
        rows: of results.csv.
        metric: its name; "" is the accuracy on test tasks or, in a run that measures none, on
            validation tasks.
    """
    rows = list(rows)
    if not metric:
        metric = ACCURACY if any(r["metric"] == ACCURACY for r in rows) else VALIDATION
    lines = summarize(rows, KEY, (metric,), baseline={"method": "standard"}, scale=100.0)
    names = {metric: "value", f"{metric}_se": "value_se", f"{metric}_vs": "value_vs"}
    return [{names.get(k, k): v for k, v in line.items()} | {"metric": metric} for line in lines]


def best_finetuning(rows: Iterable[Mapping[str, str]]) -> list[Line]:
    """Returns the lines of `summary` with the fine-tuning that does better on validation tasks.

    One line for each setting of the dial, method and number of shots.
    """
    rows = list(rows)
    found = {_of(line): line for line in summary(rows)}
    best: dict[tuple[str, ...], Line] = {}
    for line in summary(rows, VALIDATION):
        key = tuple(line[name] for name in KEY if name != "finetune")
        if _of(line) in found and (key not in best or line["value"] > best[key]["value"]):
            best[key] = line
    return [found[_of(line)] for line in best.values()]


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Returns the summary as text: first the retraining tasks, then the unseen ones."""
    rows = list(rows)
    parts = []
    for metric, what in (
        (RETRAINING, "retraining tasks"),
        (VALIDATION, "validation tasks, by which fine-tuning rates were chosen"),
        (ACCURACY, "test tasks"),
    ):
        lines = summary(rows, metric)
        if lines and (metric != VALIDATION or lines[0]["metric"] == summary(rows)[0]["metric"]):
            parts += _text(lines, what)
    return "\n".join(parts)


def results_tables(rows: Iterable[Mapping[str, str]]) -> dict[str, Table]:
    """Returns the tables for the documentation: unseen tasks, and the retraining tasks.

    Of the unseen tasks there is one with all numbers of images, and one for each, ``10-images``. A
    last one, ``last-layer-ml``, compares the methods with adapters with Last-Layer-ML, each with
    the fine-tuning that is better on validation tasks. Dials that stand still have no column.
    """
    rows = list(rows)
    what = "Held-out accuracy of {} in %, mean (standard error) over the trials"
    rows.sort(key=lambda row: float(row["flipped"]))
    titles = {"pairs": "pairs", "inputs": "inputs", "flipped": "flipped labels"}
    dials = {k: title for k, title in titles.items() if len({row[k] for row in rows}) > 1}
    if any(row["retrain_lr"] for row in rows):
        grid = {"batch_size": "batch", "retrain_lr": "learning rate"}
        means = "the validation tasks, over all settings, fine-tunings and numbers of images"
        return {"": side_by_side(rows, grid, VALIDATION, what.format(means) + ".")}
    few = {**dials, "finetune": "fine-tuning", "shots": "images"}
    unseen = what.format("the unseen test tasks") + "."
    numbers = dict.fromkeys(row["shots"] for row in rows if row["shots"])
    chosen = {_of(line) for line in best_finetuning(rows)}
    adapted = [r for r in rows if r["method"] in WITH_TASKS and _of(r) in chosen]
    adapted.sort(key=lambda row: int(row["shots"]))
    tables = {"": side_by_side(rows, few, ACCURACY, unseen)}
    for n in numbers:
        of_number = [row for row in rows if row["shots"] == n]
        tables[f"{n}-images"] = side_by_side(of_number, few, ACCURACY, unseen)
    if any(row["method"] == HEADS for row in adapted):
        better = " Of the two fine-tunings it is the one that is better on validation tasks."
        compact = {**dials, "shots": "images"}
        tables[HEADS] = side_by_side(adapted, compact, ACCURACY, unseen + better, baseline=HEADS)
    tables[RETRAINING_TASKS] = compared(
        rows,
        {**dials, "method": "retraining"},
        RETRAINING,
        what.format("the retraining tasks") + ", after the last epoch of retraining.",
    )
    return tables


def _of(line: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(line[name] for name in KEY)


def _text(lines: list[Line], what: str) -> list[str]:
    of_candidates = ("batch_size", "retrain_lr")  # known where several are tried
    used = {n: t for n, t in TITLES.items() if n not in of_candidates or any(x[n] for x in lines)}
    text = [
        f"held-out accuracy of {what} in %, mean (standard error); "
        "difference to standard [95 % interval], trials ahead",
        " ".join(used.values()),
    ]
    for line in lines:
        cells = [str(line[name] or "-").ljust(len(title)) for name, title in used.items()]
        cells.append(with_error(line["value"], line["value_se"], ".1f"))
        if line["value_vs"] is not None:
            cells.append(line["value_vs"].text(".1f"))
        text.append(" ".join(cells))
    return text
