"""Summary of a vision run, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.lib import training
from experiments.lib.statistics import summarize

COLUMNS = (
    *("experiment", "data", "method", "finetune", "shots", "draw", "finetune_lr"),
    *("trial", "metric", "value"),
)
KEY = ("data", "method", "finetune", "shots")
BEST, LAST = "accuracy_best", "accuracy_last"
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
    rows = [row for row in rows if row["metric"] in (BEST, LAST)]
    rates: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        rates.setdefault(tuple(row[k] for k in KEY), {})[row["finetune_lr"]] = None
    several = any(len(of) > 1 for of in rates.values())
    key = (*KEY, "finetune_lr") if several else KEY
    lines = summarize(rows, key, (LAST, BEST), baseline={"method": "standard"}, scale=100)
    for line in lines:
        line.setdefault("finetune_lr", next(iter(rates[tuple(line[k] for k in KEY)])))
    return lines


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Returns the summary as text, without columns that are empty."""
    lines = [{**line, **_in_paper(line)} for line in lines]
    filled = {name for line in lines for name, value in line.items() if not training.empty(value)}
    if not lines:
        return "no model was fine-tuned, so there is no accuracy of the test task"
    text = training.table(lines, {k: title for k, title in TITLES.items() if k in filled})
    text.append("held-out accuracy of the test task in %, mean (standard error) over trials")
    return "\n".join(text)


def _in_paper(line: Mapping[str, Any]) -> dict[str, float]:
    found = PAPER.get((line["method"], line["finetune"]))
    if found is None or (line["data"], line["shots"]) != ("cifar10", "all"):
        return {}
    return dict(zip(("paper", "paper_se"), found, strict=True))
