"""Rows, summary and tables of a language run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib.runs import RunFolder, standard_error, with_error

BEFORE, LAST, BEST = "accuracy_before", "accuracy_last", "accuracy_best"
METRICS = (BEFORE, LAST, BEST)
KEY = ("method", "finetune", "rank")


def show(run: RunFolder, chance: float) -> None:
    """Prints the tables of a run and where its figures are.

    Args:
        run: a run of the experiment.
        chance: accuracy of a blind choice, in percent.
    """
    lines = summary(run.rows())
    print(table(lines, chance))
    if ranks := table_of_ranks(lines):
        print(f"\n{ranks}")
    for path in sorted(run.folder.glob("*.png")):
        print(path)


def row(
    model: str,
    method: str,
    finetune: str,
    rank: Any,
    task: str,
    trial: int,
    metric: str,
    value: Any,
) -> dict[str, Any]:
    """One measured value as results.csv has it.

    Rows about retraining leave the fine-tuning out; those of no single task, the task; those
    without LoRA, the rank.
    """
    return {
        "experiment": "language",
        "model": model,
        "method": method,
        "finetune": finetune,
        "rank": "" if rank is None else rank,
        "task": task,
        "trial": trial,
        "metric": metric,
        "value": value,
    }


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Per method, fine-tuning and rank the accuracies in percent, in results' order.

    Of each trial the mean over test tasks is taken; of these the mean and the standard error,
    which for one trial is NaN.
    """
    per_task = [r for r in rows if r["metric"] in METRICS]
    lines = []
    for key, of_key in _grouped(per_task, KEY).items():
        trials = _grouped(of_key, ("trial",))
        line: dict[str, Any] = {**dict(zip(KEY, key, strict=True)), "trials": len(trials)}
        for metric in METRICS:
            means = [_mean(r for r in of if r["metric"] == metric) for of in trials.values()]
            line[metric] = statistics.fmean(means)
            line[f"{metric}_se"] = standard_error(means)
        lines.append(line)
    return lines


def by_task(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Per test task, method, fine-tuning and rank the last epoch's accuracy in percent."""
    of_metric = [r for r in rows if r["metric"] == LAST]
    lines = []
    for key, of_key in _grouped(of_metric, (*KEY, "task")).items():
        values = [100 * float(r["value"]) for r in of_key]
        line: dict[str, Any] = dict(zip((*KEY, "task"), key, strict=True))
        line |= {LAST: statistics.fmean(values), f"{LAST}_se": standard_error(values)}
        lines.append(line)
    return lines


def _grouped(
    rows: Iterable[Mapping[str, str]], names: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for r in rows:
        groups.setdefault(tuple(r[name] for name in names), []).append(r)
    return groups


def _mean(rows: Iterable[Mapping[str, str]]) -> float:
    return statistics.fmean(100 * float(r["value"]) for r in rows)


def table(lines: Iterable[Mapping[str, Any]], chance: float) -> str:
    """The summary as text: accuracy in percent, with its standard error in brackets.

    Args:
        lines: of `summary`.
        chance: accuracy of a blind choice, in percent.
    """
    text = [
        f"{'retraining':<14} {'fine-tuning':<11} {'rank':>4} {'trials':>6} "
        f"{'last epoch':>14} {'best epochs':>14} {'not fine-tuned':>15}"
    ]
    for line in lines:
        last, best, before = (with_error(line[m], line[f"{m}_se"]) for m in (LAST, BEST, BEFORE))
        text.append(
            f"{line['method']:<14} {line['finetune']:<11} {line['rank'] or '-':>4} "
            f"{line['trials']:>6} {last:>14} {best:>14} {before:>15}"
        )
    text.append(f"{'(chance)':<38} {chance:>7.2f}")
    text.append(
        "held-out accuracy in %, mean over test tasks; mean (standard error) over trials, all on "
        "the same held-out turns; best: each task at its own best epoch, which is optimistic"
    )
    return "\n".join(text)


def table_of_ranks(lines: Iterable[Mapping[str, Any]]) -> str:
    """The last epoch's accuracy after fine-tuning with LoRA: a line per method, a column per rank.

    "" where there is but one rank.
    """
    cells = {
        (line["method"], line["rank"]): with_error(line[LAST], line[f"{LAST}_se"])
        for line in lines
        if line["finetune"] == "lora"
    }
    ranks = list(dict.fromkeys(rank for _, rank in cells))
    if len(ranks) < 2:
        return ""
    text = [f"{'LoRA of rank':<14}" + "".join(f"{rank:>15}" for rank in ranks)]
    for method in dict.fromkeys(method for method, _ in cells):
        text.append(f"{method:<14}" + "".join(f"{cells[method, rank]:>15}" for rank in ranks))
    return "\n".join(text)
