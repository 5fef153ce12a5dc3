"""Means over trials, and differences between methods paired by trial, with their errors."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

CONFIDENCE = 0.95
Line = dict[str, Any]  # of a table


@dataclass(frozen=True)
class Comparison:
    """What one method gains over a baseline, from trials that both have made.

    Where a run has a single trial, its tasks stand for the trials: see `paired_unit`.

    Attributes:
        difference: mean over trials of the method's value minus the baseline's.
        low, high: the difference's two-sided 95 % interval, of Student's t distribution; NaN for
            fewer than two trials. It is not corrected for multiple comparisons.
        ahead: in how many trials the method is better; a draw is none.
        trials: how many there are.
    """

    difference: float
    low: float
    high: float
    ahead: int
    trials: int

    def __str__(self) -> str:
        return self.text(".2f")

    def text(self, form: str) -> str:
        """Returns for instance "+0.80 (-0.10 to +1.70), ahead in 4 of 5"."""
        signed = "+" + form
        interval = "n/a"
        if not math.isnan(self.low):
            interval = f"{self.low:{signed}} to {self.high:{signed}}"
        ahead = f"ahead in {self.ahead} of {self.trials}"
        return f"{self.difference:{signed}} ({interval}), {ahead}"


def compare(
    values: Mapping[Any, float],
    baseline: Mapping[Any, float],
    *,
    lower_is_better: bool = False,
    overlap: float = 0.0,
) -> Comparison:
    """Compares a method with a baseline, trial by trial.

    With n trials whose differences have the standard deviation s, half the interval's width is
    t · s · sqrt(1/n + overlap), t being the 97.5 % quantile of Student's t with n - 1 degrees of
    freedom.

    Args:
        values, baseline: the value measured in each trial. What is no trial of both is left out.
        lower_is_better: whether a trial is ahead with the lower value, as with errors.
        overlap: for trials that draw their training and test samples from the same pool, and are
            therefore not independent: the number of test samples over that of training samples.
            This is the corrected resampled t-test of Nadeau and Bengio, "Inference for the
            generalization error", Machine Learning 52, 2003. Zero is the ordinary paired t-test.

    Raises:
        ValueError: they have no trial in common.
    """
    common = [trial for trial in values if trial in baseline]
    if not common:
        raise ValueError(
            f"compare: values and baseline must have a trial in common, got {list(values)} and "
            f"{list(baseline)}"
        )
    differences = [values[trial] - baseline[trial] for trial in common]
    mean, n = statistics.fmean(differences), len(differences)
    half = math.nan
    if n > 1:
        quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))  # the inverse of Student's t
        half = quantile * statistics.stdev(differences) * math.sqrt(1 / n + overlap)
    better = [d < 0 if lower_is_better else d > 0 for d in differences]
    return Comparison(mean, mean - half, mean + half, sum(better), n)


def summarize(
    rows: Iterable[Mapping[str, str]],
    key: Sequence[str],
    metrics: Sequence[str],
    *,
    unit: str = "trial",
    baseline: Mapping[str, str] | None = None,
    lower_is_better: bool = False,
    overlap: float | Callable[[Line], float] = 0.0,
    scale: float = 1.0,
) -> list[Line]:
    """Returns what was measured for each value of the key's columns, in results' order.

    For each trial the mean over its rows (tasks, draws) is taken; then the mean over trials, and
    its standard error.

    Args:
        rows: of a results.csv, with the columns ``key``, trial, metric and value.
        key: the columns that tell the lines apart.
        metrics: those wanted.
        unit: the column to take means, errors and differences over instead of trials: "task", where
            there is only one trial. See `paired_unit`.
        baseline: columns of the key with the value that makes a line the one to compare with, such
            as ``{"method": "standard"}``: of lines that agree in all other columns.
        lower_is_better: for the trials ahead, see `compare`.
        overlap: of the trials, see `compare`; a function gets the line's columns of the key, where
            the lines have different ones. It widens the intervals, not the standard errors.
        scale: factor of all values, 100 for percent.

    Returns:
        lines with the key's columns, ``trials`` (of the first metric) and for each metric its mean
        and, as ``<metric>_se``, standard error; both are NaN where they are unknown. With a
        baseline there is also ``<metric>_vs``: a `Comparison`, or None for the baseline itself and
        where it is missing.
    """
    groups: dict[tuple[str, ...], dict[str, dict[str, list[float]]]] = {}
    trials: dict[tuple[str, ...], set[str]] = {}
    for row in rows:
        if row["metric"] in metrics:
            place = tuple(row[k] for k in key)
            group = groups.setdefault(place, {m: {} for m in metrics})
            group[row["metric"]].setdefault(row[unit], []).append(scale * float(row["value"]))
            counted = trials.setdefault(place, set())
            if row["metric"] == metrics[0]:
                counted.add(row["trial"])
    means = {
        values: {m: {u: statistics.fmean(v) for u, v in of.items()} for m, of in group.items()}
        for values, group in groups.items()
    }
    lines = []
    for values, of_metric in means.items():
        line: Line = dict(zip(key, values, strict=True))
        line["trials"] = len(trials[values])
        base: Mapping[str, dict[str, float]] = {}
        if baseline is not None:
            of_base = tuple({**line, **baseline}[k] for k in key)
            base = {} if of_base == values else means.get(of_base, {})
        wider = overlap(line) if callable(overlap) else overlap
        for metric, found in of_metric.items():
            line[metric] = statistics.fmean(found.values()) if found else math.nan
            line[f"{metric}_se"] = standard_error(list(found.values()))
            if baseline is not None:
                other = base.get(metric, {})
                line[f"{metric}_vs"] = (
                    compare(found, other, lower_is_better=lower_is_better, overlap=wider)
                    if found.keys() & other.keys()
                    else None
                )
        lines.append(line)
    return lines


def paired_unit(
    rows: Iterable[Mapping[str, str]], metric: str, key: Sequence[str] = ()
) -> tuple[str, int]:
    """Returns the column whose values a metric is averaged and paired over, and how many there are.

    It is "trial"; or "task", if there is one trial only, of several tasks that have no lines of
    their own.

    Args:
        rows: of a results.csv.
        metric: the metric.
        key: the columns that tell the lines of the table apart.
    """
    of_metric = [row for row in rows if row["metric"] == metric]
    trials, tasks = ({row.get(name) for row in of_metric} for name in ("trial", "task"))
    if len(trials) == 1 and len(tasks) > 1 and "task" not in key:
        return "task", len(tasks)
    return "trial", len(trials)


def best_choices(
    rows: Iterable[Mapping[str, str]],
    key: Sequence[str],
    choice: str,
    metric: str,
    *,
    lower_is_better: bool = False,
) -> dict[tuple[str, ...], str]:
    """Returns for each value of the key's columns the value of another column that did best.

    Args:
        rows: of a results.csv, see `summarize`.
        key: the columns that tell apart what is chosen for.
        choice: the column to choose in.
        metric: what the mean over trials is taken of; of equal means the first wins, and NaN is
            the worst.
        lower_is_better: whether the lowest mean is the best.
    """
    best: dict[tuple[str, ...], Line] = {}

    def worth(line: Line) -> tuple[bool, float]:
        return worth_of(line[metric], lower_is_better=lower_is_better)

    for line in summarize(rows, (*key, choice), (metric,)):
        of = tuple(line[k] for k in key)
        if of not in best or worth(line) > worth(best[of]):
            best[of] = line
    return {of: line[choice] for of, line in best.items()}


def worth_of(value: float, *, lower_is_better: bool = False) -> tuple[bool, float]:
    """Returns what values are compared by, highest for the best: NaN is worse than any number."""
    return not math.isnan(value), -value if lower_is_better else value


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """Returns ``mean (error)`` in the format ``form``; n/a stands for an error that is NaN."""
    return f"{mean:{form}} ({'n/a' if math.isnan(error) else format(error, form)})"
