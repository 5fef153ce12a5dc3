"""Figure 1 of the paper: prediction error while fine-tuning, a panel per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import plotting
from experiments.lib.runs import RunFolder
from experiments.synthetic.figures import MEANINGS, band, by_sweep, title_and_legend
from experiments.synthetic.settings import METHODS, SWEEPS, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Mapping[str, np.ndarray]]  # point -> method -> [trials, steps + 1]

FIRST_SHOWN, SHOWN_STEPS = 10, 200  # on a log axis the first ten steps change nothing visible


def draw(points: Sequence[Point], curves: Curves, folder: RunFolder) -> list[Path]:
    """Draws one figure per sweep and, if all sweeps are there, one with all of them.

    Returns:
        The paths of the PNG files; the figure with all sweeps comes first.
    """
    plotting.style()
    # Fixed margins and plain fonts: fitting them to every file takes longer than all trainings.
    plt.rcParams.update({"figure.constrained_layout.use": False, "pdf.fonttype": 3})
    sweeps = by_sweep(points)
    paths = [_draw_sweep(vary, group, curves, folder) for vary, group in sweeps.items()]
    if len(sweeps) == len(SWEEPS):
        paths.insert(0, _draw_all(sweeps, curves, folder))
    return paths


def _draw_sweep(vary: str, points: Sequence[Point], curves: Curves, folder: RunFolder) -> Path:
    fig, axes = plt.subplots(1, len(points), figsize=(13.3, 6), sharey=True)
    for axis, point in zip(axes, points, strict=True):
        _panel(axis, curves[point.name])
        axis.set_title(f"{point.vary} = {point.value:,}", y=1.0)
        axis.set_xlabel("fine-tuning step")
    axes[0].set_ylabel("prediction error")
    _title(fig, f"Linear model: error on the test task, varying the {MEANINGS[vary]}", curves)
    fig.subplots_adjust(left=0.08, right=0.98, top=0.84, bottom=0.22, wspace=0.12)
    return plotting.save(fig, folder, f"figure1-{vary}", _rows(points, curves))


def _draw_all(sweeps: Mapping[str, Sequence[Point]], curves: Curves, folder: RunFolder) -> Path:
    count = max(len(group) for group in sweeps.values())
    fig, axes = plt.subplots(count, len(sweeps), figsize=(18, 11), sharey="col", sharex="col")
    for column, (vary, group) in enumerate(sweeps.items()):
        for row, point in enumerate(group):
            _panel(axes[row, column], curves[point.name])
            axes[row, column].set_title(f"{point.vary} = {point.value:,}", y=1.0)
        axes[0, column].annotate(
            MEANINGS[vary],
            (0.5, 1.2),
            xycoords="axes fraction",
            ha="center",
            fontsize=16,
        )
        axes[-1, column].set_xlabel("fine-tuning step")
    for row in range(count):
        axes[row, 0].set_ylabel("prediction error")
    _title(fig, "Linear model: error on the test task in five sweeps", curves)
    fig.subplots_adjust(left=0.06, right=0.985, top=0.86, bottom=0.12, wspace=0.28, hspace=0.24)
    rows = [row for group in sweeps.values() for row in _rows(group, curves)]
    return plotting.save(fig, folder, "figure1", rows)


def _panel(axis: Axes, curves: Mapping[str, np.ndarray]) -> None:
    for method in METHODS:
        errors = curves[method]
        steps = _shown(errors)
        shown = errors[:, steps]
        band(axis, method, steps, shown.min(0), shown.mean(0), shown.max(0))
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(FIRST_SHOWN, errors.shape[1] - 1)
    plotting.log_ticks(axis.xaxis, axis.yaxis)


def _title(fig: Figure, title: str, curves: Curves) -> None:
    trials = next(iter(next(iter(curves.values())).values())).shape[0]
    title_and_legend(fig, title, f"mean and full range of {trials} trials")


def _rows(points: Sequence[Point], curves: Curves) -> list[dict[str, Any]]:
    return [
        {
            "vary": point.vary,
            "setting": point.value,
            "method": method,
            "step": int(step),
            "mean": float(errors[:, step].mean()),
            "min": float(errors[:, step].min()),
            "max": float(errors[:, step].max()),
        }
        for point in points
        for method, errors in curves[point.name].items()
        for step in _shown(errors)
    ]


def _shown(errors: np.ndarray) -> np.ndarray:
    """Returns the steps that the figure shows; the curve files hold all of them."""
    last = errors.shape[1] - 1
    return np.unique(np.geomspace(FIRST_SHOWN, last, SHOWN_STEPS).round().astype(int))
