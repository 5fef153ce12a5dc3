"""Summary of a vision run, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib import training
from experiments.lib.statistics import summarize
from experiments.lib.tables import Table, compared

COLUMNS = ("experiment", "data", "method", "finetune", "shots", "trial", "metric", "value")
BEST, LAST = "accuracy_best", "accuracy_last"
TITLES = {
    "method": "retraining    ",
    "finetune": "fine-tuning",
    "shots": "shots",
    "trials": "trials",
    BEST: "    best epoch",
    LAST: "    last epoch",
}


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Returns both accuracies in percent after each retraining, fine-tuning and number of shots."""
    return summarize(rows, ("method", "finetune", "shots"), (BEST, LAST), scale=100)


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Returns the summary as text."""
    text = training.table(lines, TITLES)
    text.append("held-out accuracy of the test task in %, mean (standard error) over trials")
    return "\n".join(text)


def results_tables(rows: Sequence[Mapping[str, str]]) -> dict[str, Table]:
    """Returns the tables for the documentation: the last epoch's accuracy, and the best epoch's."""
    key = {"finetune": "fine-tuning", "shots": "images", "method": "retraining"}
    what = "Held-out accuracy of the test task in %, mean (standard error) over the trials"
    return {
        "": compared(rows, key, LAST, f"{what}, after the last epoch."),
        "best": compared(rows, key, BEST, f"{what}, in the best epoch, which is optimistic."),
    }
