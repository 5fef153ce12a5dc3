"""One look for every figure: colours that colour-blind readers can tell apart, fixed per method."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from experiments.lib.runs import RunFiles

# Okabe and Ito, "Color Universal Design", 2008.
BLUE, GREEN, ORANGE, PINK, GREY = "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#666666"
SKY, AMBER = "#56B4E9", "#E69F00"
COLORS = {
    "lora-ml": BLUE,
    "lora-ml-heads": SKY,
    "last-layer-ml": GREEN,
    "standard": ORANGE,
    "standard-equal-steps": AMBER,
    "reptile": PINK,
    "none": GREY,
}
MARKERS = {
    "lora-ml": "o",
    "lora-ml-heads": "P",
    "last-layer-ml": "s",
    "standard": "^",
    "standard-equal-steps": "<",
    "reptile": "D",
    "none": "v",
}
LABELS = {
    "lora-ml": "LoRA-ML",
    "lora-ml-heads": "LoRA-ML, a head per task",
    "last-layer-ml": "Last-Layer-ML",
    "standard": "Standard",
    "standard-equal-steps": "Standard, equal steps",
    "reptile": "Reptile",
    "none": "Not retrained",
    "lora": "LoRA fine-tuning",
    "last-layer": "Last-layer fine-tuning",
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def style() -> None:
    """Sets fonts and lines that are readable on a slide; call before making a figure."""
    plt.rcParams.update(
        {
            "font.size": 14,
            "axes.titlesize": 15,
            "axes.labelsize": 14,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#d9d9d9",
            "grid.linewidth": 0.8,
            "lines.linewidth": 2.2,
            "lines.markersize": 9,
            "legend.frameon": False,
            "legend.fontsize": 13,
            "xtick.labelsize": 13,
            "ytick.labelsize": 13,
            "figure.constrained_layout.use": True,
            "savefig.dpi": 150,
            "pdf.fonttype": 42,
        }
    )


def log_ticks(*parts: Axis) -> None:
    """Sets a few ticks per logarithmic axis, labelled 10ⁿ in plain text.

    Laying out mathematical text takes longer than drawing everything else.
    """
    for part in parts:
        part.set_major_locator(LogLocator(numticks=6))
        part.set_minor_locator(NullLocator())
        part.set_major_formatter(FuncFormatter(_power_of_ten))


def legend_below(fig: Figure, ax: Axes) -> None:
    """Puts the legend of ``ax`` below all panels, where it hides nothing, in as few rows as fit."""
    handles, labels = ax.get_legend_handles_labels()
    for rows in range(1, len(labels) + 1):
        columns = -(-len(labels) // rows)
        legend = fig.legend(handles, labels, loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= fig.bbox.width:
            return
        legend.remove()


def save(fig: Figure, run: RunFiles, name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes a figure as name.png and name.pdf, and the numbers behind it as name.csv.

    Returns:
        The path of the PNG.
    """
    if fig.get_layout_engine() is not None:
        fig.draw_without_rendering()  # lays it out once, instead of for each file
        fig.set_layout_engine("none")
    # A fixed creation date keeps the files of equal runs equal.
    fig.savefig(run.path(f"{name}.pdf"), metadata={"CreationDate": None})
    fig.savefig(run.path(f"{name}.png"))
    plt.close(fig)
    with run.path(f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return run.path(f"{name}.png")


def _power_of_ten(value: float, position: int | None = None) -> str:
    return "10" + str(round(math.log10(value))).translate(_SUPERSCRIPTS)
