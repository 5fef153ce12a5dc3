"""Panels of accuracies: one mark per method, or a line over a setting with several values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.lib.plotting import COLORS, LABELS, MARKERS
from experiments.lib.retraining_settings import FINETUNES

Lines = Sequence[Mapping[str, Any]]  # of `experiments.lib.statistics.summarize`


def panels(lines: Lines) -> tuple[Figure, list[tuple[Axes, str, Lines]]]:
    """Makes a figure with a panel for each fine-tuning; returns axes, name and lines of each."""
    kinds = [kind for kind in FINETUNES if any(line["finetune"] == kind for line in lines)]
    size = (6.3 * len(kinds), 5.0)
    fig, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False)
    for ax, kind in zip(axes[0], kinds, strict=True):
        ax.set_title(LABELS[kind])
    of = [[line for line in lines if line["finetune"] == kind] for kind in kinds]
    return fig, list(zip(axes[0], kinds, of, strict=True))


def trials_of(lines: Lines) -> str:
    """Returns in words how many trials the numbers are means of: "3 trials", "2 to 5 trials"."""
    counts = {line["trials"] for line in lines}
    least, most = min(counts), max(counts)
    count = f"{most}" if least == most else f"{least} to {most}"
    return f"{count} trial{'s' if most > 1 else ''}"


def shown_of(lines: Lines) -> str:
    """Returns in words what the marks and their bars are.

    With one trial the errors are over test tasks, if they are known: see
    `experiments.lib.statistics.paired_unit`.
    """
    if max(line["trials"] for line in lines) > 1:
        return f"mean and standard error of {trials_of(lines)}"
    errors = [value for line in lines for name, value in line.items() if name.endswith("_se")]
    if all(math.isnan(error) for error in errors):
        return "1 trial, no error estimate"
    return "1 trial, mean and standard error over the test tasks"


def dots(ax: Axes, lines: Lines, names: Sequence[str], *metrics: str) -> None:
    """Draws a mark for each line, filled for the first metric and hollow for a second one."""
    shift = 0.1 * (len(metrics) - 1)
    for place, line in enumerate(lines):
        color = COLORS[line["method"]]
        for metric, at, face in zip(metrics, (-shift, shift), (color, "white"), strict=False):
            error = line[f"{metric}_se"]
            ax.errorbar(
                place + at,
                line[metric],
                yerr=None if math.isnan(error) else error,
                fmt=MARKERS[line["method"]],
                color=color,
                markerfacecolor=face,
                markeredgewidth=2,
                capsize=5,
            )
        ax.annotate(
            f"{line[metrics[0]]:.1f}",
            (place - shift, line[metrics[0]]),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=12,
        )
    broken = {"Last-Layer": "Last-\nLayer", "Not retrained": "Not\nretrained"}
    for long, short in broken.items():
        names = [name.replace(long, short) for name in names]
    ax.set_xticks(range(len(lines)), names)
    ax.set_xlim(-0.6, len(lines) - 0.4)
    ax.grid(axis="x", visible=False)


def over(
    ax: Axes, lines: Lines, name: str, values: Sequence[str], metric: str, *, joined: bool = True
) -> None:
    """Draws a line per method over the values of the setting ``name``, or marks alone."""
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for number, method in enumerate(methods):
        found = {line[name]: line for line in lines if line["method"] == method}
        places = [i for i, value in enumerate(values) if value in found]
        of_method = [found[values[i]] for i in places]
        errors = [line[f"{metric}_se"] for line in of_method]
        ax.errorbar(
            # Side by side, so that no error bar hides another's.
            [i + 0.06 * (number - (len(methods) - 1) / 2) for i in places],
            [line[metric] for line in of_method],
            yerr=None if all(map(math.isnan, errors)) else errors,  # NaN draws no bar
            color=COLORS[method],
            marker=MARKERS[method],
            linestyle="-" if joined else "none",
            capsize=4,
            label=LABELS[method],
        )
    ax.set_xticks(range(len(values)), values)
    ax.set_xlim(-0.4, len(values) - 0.6)
    ax.grid(axis="x", visible=False)
