"""Tables of the documentation, and the one that compares retrainings trial by trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.lib.statistics import Comparison, Line, paired_unit, summarize, with_error

STANDARD = "standard"
DIFFERENCE = "difference to standard [95 %]"
AHEAD = "ahead"
NAMES = {
    "lora-ml": "LoRA-ML",
    "lora-ml-heads": "LoRA-ML, a head per task",
    "last-layer-ml": "Last-Layer-ML",
    "standard": "standard",
    "standard-equal-steps": "standard, equal steps",
    "reptile": "Reptile",
    "none": "not retrained",
    "lora": "LoRA",
    "last-layer": "last layer",
}
NAMED = ("method", "finetune")  # the columns that hold them


@dataclass(frozen=True)
class Table:
    """A table with what a reader has to know about it.

    Attributes:
        header: the titles of the columns.
        rows: the texts of the cells, for each row.
        caption: sentences that say what the numbers are, and what they do not show.
        left: how many columns are aligned to the left; the others hold numbers.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    left: int = 1

    def markdown(self) -> str:
        """Returns the table in Markdown, without the caption."""
        align = ["---" if place < self.left else "---:" for place in range(len(self.header))]
        return "\n".join(
            "| " + " | ".join(cells) + " |" for cells in (self.header, align, *self.rows)
        )


def compared(
    rows: Iterable[Mapping[str, str]],
    key: Mapping[str, str],
    metric: str,
    caption: str,
    *,
    title: str = "accuracy, %",
    **form: Any,
) -> Table:
    """Makes a table of one metric: mean, standard error, paired difference to standard retraining.

    Args:
        rows: of results.csv, with the columns of the key, trial, metric and value.
        key: the title of each column that tells the lines apart; "method" is one of them.
        metric: its name in the rows.
        caption: see `Table`. Where there is one trial only, a sentence says so.
        title: of the metric's column.
        form: see `_measured`.
    """
    rows = list(rows)
    lines = [
        [*(_name(n, line[n]) for n in key), mean, *cells, str(line["trials"])]
        for line, mean, cells in _measured(rows, key, metric, **form)
    ]
    header = [*key.values(), title, DIFFERENCE, AHEAD, "trials"]
    return Table(header, lines, caption + one_trial(rows, metric, [*key]), left=len(key))


def side_by_side(
    rows: Iterable[Mapping[str, str]],
    settings: Mapping[str, str],
    metric: str,
    caption: str,
    *,
    baseline: str = STANDARD,
    **form: Any,
) -> Table:
    """Makes the table of `compared` with a column for each retraining, for many settings.

    The baseline comes first. The difference to it and the trials ahead stand below the mean.

    Args:
        rows: of results.csv, with the columns of the settings, method, trial, metric and value.
        settings: the title of each column that tells the lines apart.
        metric, caption: see `compared`.
        baseline: the method to compare with.
        form: see `_measured`.
    """
    rows = list(rows)
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    trials: dict[tuple[str, ...], set[int]] = {}
    methods: dict[str, None] = {}
    measured = _measured(rows, [*settings, "method"], metric, baseline=baseline, **form)
    for line, mean, (against, ahead) in measured:
        place = tuple(_name(n, line[n]) for n in settings)
        text = f"{mean}<br>{against}, {ahead}" if against else mean
        cells.setdefault(place, {})[line["method"]] = text
        trials.setdefault(place, set()).add(line["trials"])
        methods.setdefault(line["method"])
    ordered = sorted(methods, key=lambda method: method != baseline)
    lines = [
        [
            *place,
            *(of.get(method, "") for method in ordered),
            " to ".join(str(n) for n in sorted({min(trials[place]), max(trials[place])})),
        ]
        for place, of in cells.items()
    ]
    header = [*settings.values(), *(NAMES[method] for method in ordered), "trials"]
    if any("<br>" in cell for line in lines for cell in line):
        caption += (
            f" Below a mean: the difference to {NAMES[baseline]} [95 %], and in how many trials it "
            "is ahead."
        )
    caption += one_trial(rows, metric, [*settings])
    return Table(header, lines, caption, left=len(settings))


def one_trial(rows: Iterable[Mapping[str, str]], metric: str, key: Sequence[str]) -> str:
    """Returns the sentence of a caption that says what the errors of a single trial are over.

    It begins with a space, and is empty if there are several trials.

    Args:
        rows, metric, key: see `paired_unit`.
    """
    unit, count = paired_unit(rows, metric, key)
    if unit == "task":
        return (
            f" One trial: standard errors, intervals and 'ahead' are over the {count} test tasks."
        )
    return " One trial: no error estimate." if count == 1 else ""


def _measured(
    rows: Sequence[Mapping[str, str]],
    key: Iterable[str],
    metric: str,
    *,
    baseline: str = STANDARD,
    scale: float = 100.0,
    digits: int = 1,
    lower_is_better: bool = False,
    overlap: float | Callable[[Line], float] = 0.0,
) -> Iterator[tuple[Line, str, tuple[str, str]]]:
    """Yields the lines of a table with the texts of their mean and of their `difference`.

    Errors and differences are over trials, or over tasks where there is one trial only.

    Args:
        rows, metric: see `compared`.
        key: the columns that tell the lines apart.
        baseline: the method to compare with.
        scale: what to multiply the values by: 100 for percent.
        digits: after the decimal point.
        lower_is_better: for the trials ahead.
        overlap: of the trials, see `summarize`.
    """
    key = list(key)
    found = summarize(
        rows,
        key,
        [metric],
        unit=paired_unit(rows, metric, key)[0],
        baseline={"method": baseline},
        lower_is_better=lower_is_better,
        overlap=overlap,
        scale=scale,
    )
    settings = [name for name in key if name != "method"]
    places = {line: place for place, line in enumerate(_values(found, settings))}
    known = any(not math.isnan(line[f"{metric}_se"]) for line in found)
    for line in sorted(found, key=lambda line: places[tuple(line[name] for name in settings)]):
        mean = f"{line[metric]:.{digits}f}"
        if known:
            mean = with_error(line[metric], line[f"{metric}_se"], f".{digits}f")
        yield line, mean, difference(line[f"{metric}_vs"], lambda value: f"{value:.{digits}f}")


def _name(column: str, value: str) -> str:
    return (NAMES.get(value, value) if column in NAMED else value) or "–"


def _values(lines: Iterable[Mapping[str, Any]], names: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the values of some columns, each once, in the order in which they come."""
    return list(dict.fromkeys(tuple(line[name] for name in names) for line in lines))


def difference(found: Comparison | None, form: Callable[[float], str]) -> tuple[str, str]:
    """Returns a difference with its interval and the trials ahead, as two cells.

    Args:
        found: the comparison; None leaves both empty.
        form: turns a number into text.
    """
    if found is None:
        return "", ""
    mean, low, high = (
        ("+" if value > 0 else "") + form(value).replace("-", "−")
        for value in (found.difference, found.low, found.high)
    )
    interval = "" if math.isnan(found.low) else f" [{low}, {high}]"
    return mean + interval, f"{found.ahead} of {found.trials}"


def three_digits(value: float) -> str:
    """Returns a number with three digits, or with all of a large one's."""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"
