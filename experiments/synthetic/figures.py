"""The parts shared by the figures of the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from experiments.lib import plotting
from experiments.synthetic.settings import SWEEPS, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MEANINGS = {
    "T": "number of tasks, T",
    "n": "fine-tuning samples, n",
    "N": "retraining samples, N",
    "k": "adapter rank, k",
    "d": "dimension, d",
}
LINES = {"lora-ml": "-", "standard": "--"}


def by_sweep(points: Sequence[Point]) -> dict[str, list[Point]]:
    """Groups the points by sweep, and leaves out sweeps without points."""
    sweeps = {vary: [point for point in points if point.vary == vary] for vary in SWEEPS}
    return {vary: group for vary, group in sweeps.items() if group}


def band(axis: Axes, method: str, x: Any, low: Any, middle: Any, high: Any, **look: Any) -> None:
    """Draws a method's line over its range of trials."""
    color = plotting.COLORS[method]
    axis.fill_between(x, low, high, color=color, alpha=0.25, linewidth=0)
    label = plotting.LABELS[method]
    axis.plot(x, middle, color=color, linestyle=LINES[method], label=label, **look)


def title_and_legend(fig: Figure, title: str, shown: str) -> None:
    """Puts a title above the panels and one legend for all of them below.

    Args:
        fig: its first panel has the methods' labels.
        title: the title.
        shown: which statistics of the trials are drawn.
    """
    fig.suptitle(title, fontsize=20)
    handles, labels = fig.axes[0].get_legend_handles_labels()
    labels[-1] += f"     ({shown})"
    fig.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=15)
