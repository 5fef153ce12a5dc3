"""Summary of a language run, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib import training
from experiments.lib.statistics import paired_unit, summarize, with_error
from experiments.lib.tables import Table, compared, one_trial

COLUMNS = (
    *("experiment", "model", "method", "finetune", "rank"),
    *("task", "trial", "metric", "value"),
)
BEFORE, LAST, BEST = "accuracy_before", "accuracy_last", "accuracy_best"
RETRAINING = "validation_last"
METRICS = (BEFORE, LAST, BEST)
KEY = ("method", "finetune", "rank")
TITLES = {
    "method": "retraining    ",
    "finetune": "fine-tuning",
    "rank": "rank",
    "trials": "trials",
    LAST: "    last epoch",
    BEST: "   best epochs",
    BEFORE: " not fine-tuned",
}


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns accuracies in percent after each retraining and fine-tuning with each rank.

    For each trial the mean over test tasks is taken first; errors are over trials or, with one
    trial alone, over test tasks.
    """
    rows = list(rows)
    return summarize(rows, KEY, METRICS, unit=paired_unit(rows, LAST, KEY)[0], scale=100)


def by_task(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns the last epoch's accuracy in percent, of each test task by itself."""
    return summarize(rows, (*KEY, "task"), (LAST,), scale=100)


def tables(rows: Sequence[Mapping[str, str]], chance: float) -> str:
    """Returns the summary as text and, for several ranks of LoRA, a table of these.

    Args:
        chance: accuracy of a blind choice, in percent.
    """
    lines = summary(rows)
    text = training.table(lines, TITLES)
    text.append(f"{'(chance)':<38} {chance:>7.2f}")
    text.append(
        "held-out accuracy in %, mean over test tasks; mean (standard error) over trials, all on "
        "the same held-out turns; best: each task at its own best epoch, which is optimistic"
    )
    text += [line for line in [one_trial(rows, LAST, KEY).strip()] if line]
    return "\n".join([*text, *table_of_ranks(lines)])


def table_of_ranks(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns LoRA's accuracy in the last epoch: a line per method, a column per rank.

    Empty if there is only one rank.
    """
    cells = {
        (line["method"], line["rank"]): with_error(line[LAST], line[f"{LAST}_se"])
        for line in lines
        if line["finetune"] == "lora"
    }
    ranks = list(dict.fromkeys(rank for _, rank in cells))
    if len(ranks) < 2:
        return []
    text = ["", f"{'LoRA of rank':<14}" + "".join(f"{rank:>15}" for rank in ranks)]
    for method in dict.fromkeys(method for method, _ in cells):
        text.append(f"{method:<14}" + "".join(f"{cells[method, rank]:>15}" for rank in ranks))
    return text


def results_tables(rows: Sequence[Mapping[str, str]]) -> dict[str, Table]:
    """Returns the tables for the documentation.

    The main one has the test tasks after the last epoch, "before" before fine-tuning; "retraining"
    has the retraining tasks, if there was retraining, unless LoRA has several ranks. Ranks have a
    column if there are several.
    """
    what = (
        "Held-out accuracy in %, mean over {} tasks; mean (standard error) over the trials, all "
        "on the same held-out turns"
    )
    test, retrained = what.format("test"), [row for row in rows if not row["finetune"]]
    several = len({row["rank"] for row in rows if row["rank"]}) > 1
    ranks = {"rank": "rank"} if several else {}
    key = {"finetune": "fine-tuning", **ranks, "method": "retraining"}
    tables = {
        "": compared(rows, key, LAST, f"{test}, after the last epoch."),
        "before": compared(rows, key, BEFORE, f"{test}, before fine-tuning."),
    }
    if retrained and not several:
        caption = what.format("retraining") + ", after the last epoch."
        tables["retraining"] = compared(retrained, {"method": "retraining"}, RETRAINING, caption)
    return tables
