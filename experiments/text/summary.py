"""Summary of a text run, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.lib.statistics import Line, paired_unit, summarize, with_error
from experiments.lib.tables import NAMES, STANDARD, Table, compared, one_trial, side_by_side

COLUMNS = (
    *("experiment", "model", "method", "finetune", "amount"),
    *("task", "trial", "metric", "value"),
)
BITS, BEFORE, PERPLEXITY = "bits", "bits_before", "perplexity"
VALIDATION, RATE = "validation_bits", "learning_rate"
RETRAINING = "validation_last"  # minus the bits, as the highest validation is the best
KEY = ("finetune", "amount", "method")
SAMPLES = "samples.json"
_WHAT = "Bits per byte of {}, mean (standard error) over the trials; the lower the better"


def summary(rows: Iterable[Mapping[str, str]], metric: str = "") -> list[Line]:
    """Returns a metric after each retraining, fine-tuning and amount of text.

    For each trial the mean over tasks is taken first; errors and differences are over trials or,
    with one trial alone, over tasks.

    Args:
        rows: of results.csv.
        metric: its name; "" is the bits of test tasks or, in a run that measures none, of
            validation tasks.
    """
    rows = _shown(rows)
    metric = metric or _main(rows)
    unit, _ = paired_unit(rows, metric, KEY)
    lines = summarize(
        rows, KEY, (metric,), unit=unit, baseline={"method": STANDARD}, lower_is_better=True
    )
    names = {metric: "value", f"{metric}_se": "value_se", f"{metric}_vs": "value_vs"}
    return [{names.get(k, k): v for k, v in line.items()} for line in lines]


def by_task(rows: Iterable[Mapping[str, str]]) -> list[Line]:
    """Returns the bits of each test task by itself, with the most text."""
    return summarize(_most(rows), (*KEY, "task"), (BITS,))


def table(rows: Iterable[Mapping[str, str]]) -> str:
    """Returns the summary as text: the retraining tasks, then the unseen ones."""
    rows = list(rows)
    text = ["bits per byte, mean (standard error) over trials; difference to standard [95 %]"]
    for line in summary(_retraining(rows), RETRAINING):
        text.append(f"{line['method']:<14} retraining tasks {_value(line)}")
    for line in summary(rows):
        what = f"{line['finetune']:<10} {line['amount']:>5} kB"
        text.append(f"{line['method']:<14} {what} {_value(line)}")
    text += [line for line in [one_trial(rows, _main(rows), KEY).strip()] if line]
    return "\n".join(text)


def results_tables(
    rows: Sequence[Mapping[str, str]], samples: Sequence[Mapping[str, Any]]
) -> dict[str, Table]:
    """Returns the tables for the documentation.

    The main one has the unseen tasks, "before" the same before they are adapted to, "retraining"
    the retraining tasks, "languages" each test task, and "samples" text written in one of them.

    Args:
        rows: of results.csv.
        samples: of samples.json.
    """
    rows = _shown(rows)
    settings = {"finetune": "fine-tuning", "amount": "kB of text"}
    form: dict[str, Any] = {"scale": 1.0, "digits": 3, "lower_is_better": True}
    title = "bits per byte"
    unseen = _WHAT.format("held-out text of the unseen test tasks")
    each = _WHAT.format("held-out text of each unseen test task")
    before = [dict(r, finetune="", amount="") for r in rows if r["metric"] == BEFORE]
    return {
        "": side_by_side(rows, settings, BITS, f"{unseen}.", **form),
        "before": compared(
            before, {"method": "retraining"}, BEFORE, f"{unseen}.", title=title, **form
        ),
        "retraining": compared(
            _retraining(rows),
            {"method": "retraining"},
            RETRAINING,
            _WHAT.format("held-out text of the retraining tasks, after the last epoch") + ".",
            title=title,
            **form,
        ),
        "languages": side_by_side(
            _most(rows), {**settings, "task": "task"}, BITS, f"{each}.", **form
        ),
        "samples": _samples(samples),
    }


def _shown(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Returns the rows with amounts as one types them: 4 instead of 4.0."""
    return [{**row, "amount": f"{float(row['amount'] or 0):g}"} for row in rows]


def _most(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Returns the rows of the largest amount of text."""
    rows = _shown(rows)
    most = max((row["amount"] for row in rows if row["metric"] == BITS), key=float, default="")
    return [row for row in rows if row["amount"] == most]


def _main(rows: Iterable[Mapping[str, str]]) -> str:
    return BITS if any(row["metric"] == BITS for row in rows) else VALIDATION


def _retraining(rows: Iterable[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Returns the rows of retrainings with their bits instead of minus these."""
    return [
        {**row, "value": str(-float(row["value"]))} for row in rows if row["metric"] == RETRAINING
    ]


def _value(line: Line) -> str:
    text = with_error(line["value"], line["value_se"], ".3f")
    return text if line["value_vs"] is None else f"{text}  {line['value_vs'].text('.3f')}"


def _samples(samples: Iterable[Mapping[str, Any]]) -> Table:
    """Returns a table of the text in one task, the first."""
    samples = list(samples)
    first = min((str(one["task"]) for one in samples), default="")
    rows = [
        [first, NAMES[one["method"]], _cell(one["prompt"]), _cell(one["text"])]
        for one in samples
        if str(one["task"]) == first
    ]
    return Table(
        ["task", "retraining", "beginning, from held-out text", "what the model writes"],
        rows,
        "Text written after adapting with LoRA to the most text, in the first trial; each token is "
        "drawn from the model's distribution at temperature 0.7.",
        left=4,
    )


def _cell(text: str) -> str:
    """Returns a text that a cell of a table in Markdown can hold."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    marks = {ord(c): f"&#{ord(c)};" for c in "\\`*_[]<>|#$~&"}
    return " ".join(shown.translate(marks).split())
