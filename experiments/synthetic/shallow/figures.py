"""The shallow network's figures: prediction error after fine-tuning, a panel per sweep."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from experiments.lib import plotting
from experiments.lib.runs import RunFiles
from experiments.synthetic.figures import MEANINGS, band, by_sweep, title_and_legend
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.shallow.summary import Summaries

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRIC = "prediction_error"


def draw(
    points: Sequence[Point], summaries: Summaries, trials: int, folder: RunFiles
) -> list[Path]:
    """Draws one figure per sweep and, if there are several sweeps, one with all of them.

    Returns:
        The paths of the PNG files; the figure with all sweeps comes first.
    """
    plotting.style()
    plt.rcParams.update({"figure.constrained_layout.use": False})
    sweeps = by_sweep(points)
    paths = []
    if len(sweeps) > 1:
        fig, axes = plt.subplots(1, len(sweeps), figsize=(18, 5.2), sharey=True)
        for axis, (vary, group) in zip(axes, sweeps.items(), strict=True):
            _panel(axis, group, summaries)
            axis.set_xlabel(MEANINGS[vary])
        axes[0].set_ylabel("prediction error")
        _title(fig, "Shallow network: error on the test task in five sweeps", trials)
        fig.subplots_adjust(left=0.055, right=0.99, top=0.86, bottom=0.27, wspace=0.18)
        paths.append(plotting.save(fig, folder, "shallow", _rows(points, summaries)))
    for vary, group in sweeps.items():
        fig, axis = plt.subplots(figsize=(10, 6))
        _panel(axis, group, summaries)
        axis.set_xlabel(MEANINGS[vary])
        axis.set_ylabel("prediction error")
        _title(fig, f"Shallow network: varying the {MEANINGS[vary]}", trials)
        fig.subplots_adjust(left=0.11, right=0.97, top=0.9, bottom=0.22)
        paths.append(plotting.save(fig, folder, f"shallow-{vary}", _rows(group, summaries)))
    return paths


def _panel(axis: Axes, points: Sequence[Point], summaries: Summaries) -> None:
    places = range(len(points))
    for method in METHODS:
        found = [summaries[point.name, method, METRIC] for point in points]
        low, middle, high = zip(*((s.low, s.median, s.high) for s in found), strict=True)
        band(axis, method, places, low, middle, high, marker=plotting.MARKERS[method])
    axis.set_yscale("log")
    axis.set_xticks(places, [f"{point.value:,}" for point in points])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _title(fig: Figure, title: str, trials: int) -> None:
    central = f"median and central {trials - 2 * (trials // 5)} of {trials} trials"
    title_and_legend(fig, title, central)


def _rows(points: Sequence[Point], summaries: Summaries) -> list[dict[str, Any]]:
    return [
        {
            "vary": point.vary,
            "setting": point.value,
            "method": method,
            "median": found.median,
            "low": found.low,
            "high": found.high,
        }
        for point in points
        for method in METHODS
        for found in [summaries[point.name, method, METRIC]]
    ]
