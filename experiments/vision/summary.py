"""Summary of a vision run, and its table."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib import training
from experiments.lib.retraining_settings import ALL, FINETUNES, METHODS
from experiments.lib.statistics import summarize, with_error
from experiments.lib.tables import NAMES, STANDARD, Table, compared, side_by_side

COLUMNS = (
    *("experiment", "data", "method", "finetune", "shots", "draw", "finetune_lr"),
    *("trial", "metric", "value"),
)
KEY = ("data", "method", "finetune", "shots")
BEST, LAST = "accuracy_best", "accuracy_last"
RETRAINING = "validation_last"
AGAINST = f"{LAST}_vs"  # standard retraining
# Table 1 of the paper: fine-tuning on all images, best epoch, mean and standard error of 5 trials.
PAPER: Mapping[tuple[str, str], tuple[float, float]] = {
    ("lora-ml", "lora"): (86.09, 0.35),
    ("standard", "lora"): (85.29, 0.17),
    ("reptile", "lora"): (81.30, 0.42),
    ("last-layer-ml", "last-layer"): (83.90, 0.17),
    ("standard", "last-layer"): (81.16, 0.22),
    ("reptile", "last-layer"): (72.55, 0.39),
}
_WHAT = "Held-out accuracy of the {} in %, mean (standard error) over the trials"
TITLES = {
    "method": "retraining    ",
    "finetune": "fine-tuning",
    "shots": "shots",
    "finetune_lr": "   rate",
    "trials": "trials",
    LAST: "    last epoch",
    AGAINST: "last epoch against standard, 95 % interval    ",
    BEST: "    best epoch",
    "paper": "  paper (best)",
}


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns accuracies in percent after each retraining, fine-tuning and number of shots.

    Of each trial the mean over draws is taken first. Where a run has several rates of fine-tuning,
    each has a line of its own, compared with standard retraining at the same rate; otherwise every
    line has the rate that it was run with.
    """
    rates = _rates(rows := complete(rows))
    key = KEY if all(len(of) == 1 for of in rates.values()) else (*KEY, "finetune_lr")
    lines = summarize(rows, key, (LAST, BEST), baseline={"method": STANDARD}, scale=100)
    for line in lines:
        line.setdefault("finetune_lr", rates[tuple(line[k] for k in KEY)][0])
    return lines


def complete(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Leaves out the trials whose draws are not all done yet: they would be compared with others.

    Args:
        rows: of a results.csv, perhaps of a run that goes on.
    """
    found: dict[tuple[str, ...], set[str]] = {}
    draws: dict[str, set[str]] = {}
    fine_tuned = [row for row in rows if row["finetune"]]
    for row in fine_tuned:
        found.setdefault(_trial(row), set()).add(row["draw"])
        draws.setdefault(row["shots"], set()).add(row["draw"])
    return [row for row in fine_tuned if found[_trial(row)] == draws[row["shots"]]]


def _trial(row: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(row[k] for k in (*KEY, "finetune_lr", "trial"))


def _rates(rows: Iterable[Mapping[str, str]]) -> dict[tuple[str, ...], list[str]]:
    """Returns the rates of fine-tuning by the key's columns."""
    rates: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        rates.setdefault(tuple(row[k] for k in KEY), {})[row["finetune_lr"]] = None
    return {of: list(found) for of, found in rates.items()}


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Returns the summary as text, without columns that are empty."""
    lines = [{**line, **_in_paper(line)} for line in lines]
    filled = {name for line in lines for name, value in line.items() if not training.empty(value)}
    if not lines:
        return "no model was fine-tuned, so there is no accuracy of the test task"
    text = training.table(lines, {k: title for k, title in TITLES.items() if k in filled})
    text.append("held-out accuracy of the test task in %, mean (standard error) over trials")
    return "\n".join(text)


def results_tables(rows: Sequence[Mapping[str, str]]) -> dict[str, Table]:
    """Returns the tables for the documentation.

    "retraining" is of the retraining tasks, where they were retrained, the others of the test task.
    The main one has the last epoch's accuracy; "short" has it without differences, a line for each
    retraining and a column for each number of images, beside that of the retraining tasks; "best"
    has the best epoch's, where it was measured, and the paper's beside it.
    """
    retrained = [row for row in rows if not row["finetune"]]
    rows = sorted(complete(rows), key=_place)
    settings = {"finetune": "fine-tuning", "shots": "images"}
    if any(len(of) > 1 for of in _rates(rows).values()):
        settings["finetune_lr"] = "learning rate"
    test = _WHAT.format("test task")
    tables = {"": side_by_side(rows, settings, LAST, f"{test}, after the last epoch.")}
    if retrained and rows and "finetune_lr" not in settings:
        tables["short"] = _short(rows, retrained)
    if retrained:
        what = f"{_WHAT.format('retraining tasks')}, after the last epoch."
        retrained.sort(key=lambda row: METHODS.index(row["method"]))
        tables["retraining"] = compared(retrained, {"method": "retraining"}, RETRAINING, what)
    if any(row["metric"] == BEST for row in rows):
        key = {**settings, "method": "retraining"}
        best = compared(rows, key, BEST, f"{test}, in the best epoch, which is optimistic.")
        tables["best"] = _with_paper(best) if rows[0]["data"] == "cifar10" else best
    return tables


def _short(rows: Sequence[Mapping[str, str]], retrained: Sequence[Mapping[str, str]]) -> Table:
    """Returns a table that has one line for each retraining and fine-tuning.

    Args:
        rows: of the fine-tunings, in the order of the documentation.
        retrained: of the retrainings.
    """
    shots = list(dict.fromkeys(row["shots"] for row in rows))
    before = {
        line["method"]: _cell(line, RETRAINING)
        for line in summarize(retrained, ("method",), (RETRAINING,), scale=100)
    }
    cells: dict[tuple[str, str], dict[str, str]] = {}
    trials: set[int] = set()
    for line in summarize(rows, KEY, (LAST,), scale=100):
        cells.setdefault((line["method"], line["finetune"]), {})[line["shots"]] = _cell(line, LAST)
        trials.add(line["trials"])
    counted = " to ".join(str(count) for count in sorted({min(trials), max(trials)}))
    over = f"mean (standard error) over {counted} trials" if trials != {1} else "one trial"
    return Table(
        ["retraining", "fine-tuning", "retraining tasks", *(f"{few} images" for few in shots)],
        [
            [
                *(NAMES[method], NAMES[kind], before.get(method, "")),
                *(of.get(few, "") for few in shots),
            ]
            for (method, kind), of in cells.items()
        ],
        "Held-out accuracy in % of the retraining tasks, and of the test task after fine-tuning "
        f"on so many of its images: {over}, last epoch.",
        left=2,
    )


def _cell(line: Mapping[str, Any], metric: str) -> str:
    mean, error = line[metric], line[f"{metric}_se"]
    return f"{mean:.1f}" if math.isnan(error) else with_error(mean, error, ".1f")


def number(shots: str) -> float:
    """Returns a number of images; infinity for all of them."""
    return math.inf if shots == ALL else int(shots)


def _place(row: Mapping[str, str]) -> tuple[Any, ...]:
    """Returns where a row belongs in the documentation's tables."""
    return (FINETUNES.index(row["finetune"]), number(row["shots"]), METHODS.index(row["method"]))


def _with_paper(table: Table) -> Table:
    """Returns a table of best epochs, with a column of the paper's numbers if it has any."""
    texts = {
        (NAMES[kind], ALL, NAMES[method]): with_error(*found)
        for (method, kind), found in PAPER.items()
    }
    paper = [texts.get((row[0], row[1], row[2]), "") for row in table.rows]
    if not any(paper):
        return table
    return dataclasses.replace(
        table,
        header=[*table.header, "paper"],
        rows=[[*row, text] for row, text in zip(table.rows, paper, strict=True)],
    )


def _in_paper(line: Mapping[str, Any]) -> dict[str, float]:
    found = PAPER.get((line["method"], line["finetune"]))
    if found is None or (line["data"], line["shots"]) != ("cifar10", ALL):
        return {}
    return dict(zip(("paper", "paper_se"), found, strict=True))
