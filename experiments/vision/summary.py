"""Summary of a vision run, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.lib import training
from experiments.lib.statistics import summarize

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
