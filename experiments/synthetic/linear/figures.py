"""Figure 1 of the paper: prediction error while fine-tuning, a panel per setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import plotting
from experiments.lib.runs import RunFiles
from experiments.synthetic.figures import MEANINGS, band, by_sweep, title_and_legend
from experiments.synthetic.settings import METHODS, SWEEPS, Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FIRST_SHOWN, SHOWN_STEPS = 10, 60  # on a log axis the first ten steps change nothing visible

# One method's prediction error at one setting: "step", "mean", "min" and "max", each an array.
Curve = Mapping[str, np.ndarray]
Curves = Mapping[tuple[str, str], Curve]  # by the point's name and the method

ALL = "figure1"
ERROR = "squared prediction error"


def draw(points: Sequence[Point], curves: Curves, trials: int, folder: RunFiles) -> list[Path]:
    """Draws one figure per sweep and, if all sweeps are there, one with all of them.

    Returns:
        The paths of the PNG files; the figure with all sweeps comes first.
    """
    plotting.style()
    # Fixed margins and plain fonts: fitting them to every file takes longer than all trainings.
    plt.rcParams.update({"figure.constrained_layout.use": False, "pdf.fonttype": 3})
    sweeps = by_sweep(points)
    shown = f"mean and full range of {trials} trials"
    paths = [_draw_sweep(vary, group, curves, shown, folder) for vary, group in sweeps.items()]
    if len(sweeps) == len(SWEEPS):
        paths.insert(0, _draw_all(sweeps, curves, shown, folder))
    return paths


def _draw_sweep(
    vary: str, points: Sequence[Point], curves: Curves, shown: str, folder: RunFiles
) -> Path:
    fig, axes = plt.subplots(1, len(points), figsize=(13.3, 6), sharey=True)
    for axis, point in zip(axes, points, strict=True):
        _panel(axis, point, curves)
        axis.set_title(f"{point.vary} = {point.value:,}", y=1.0)
        axis.set_xlabel("fine-tuning step")
    axes[0].set_ylabel(f"{ERROR},\nsummed over n samples")
    title = f"Linear model: error on the test task, varying the {MEANINGS[vary]}"
    title_and_legend(fig, title, shown)
    fig.subplots_adjust(left=0.08, right=0.98, top=0.84, bottom=0.22, wspace=0.12)
    return plotting.save(fig, folder, f"{ALL}-{vary}", _rows(points, curves))


def _draw_all(
    sweeps: Mapping[str, Sequence[Point]], curves: Curves, shown: str, folder: RunFiles
) -> Path:
    count = max(len(group) for group in sweeps.values())
    fig, axes = plt.subplots(count, len(sweeps), figsize=(18, 11), sharey="col", sharex="col")
    for column, (vary, group) in enumerate(sweeps.items()):
        for row, point in enumerate(group):
            _panel(axes[row, column], point, curves)
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
        axes[row, 0].set_ylabel(f"{ERROR},\nsummed over n samples")
    title_and_legend(fig, "Linear model: error on the test task in five sweeps", shown)
    fig.subplots_adjust(left=0.06, right=0.985, top=0.86, bottom=0.12, wspace=0.28, hspace=0.24)
    rows = [row for group in sweeps.values() for row in _rows(group, curves)]
    return plotting.save(fig, folder, ALL, rows)


def _panel(axis: Axes, point: Point, curves: Curves) -> None:
    for method in METHODS:
        curve = curves[point.name, method]
        band(axis, method, curve["step"], curve["min"], curve["mean"], curve["max"])
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(curve["step"][0], curve["step"][-1])
    plotting.log_ticks(axis.xaxis, axis.yaxis)


def _rows(points: Sequence[Point], curves: Curves) -> list[dict[str, Any]]:
    return [
        {"vary": point.vary, "setting": point.value, "method": method, "step": int(step)}
        | {name: float(f"{curve[name][place]:.6g}") for name in ("mean", "min", "max")}
        for point in points
        for method in METHODS
        for curve in [curves[point.name, method]]
        for place, step in enumerate(curve["step"])
    ]


def of_trials(errors: Mapping[str, Mapping[str, np.ndarray]]) -> Curves:
    """Returns the curves to draw of the trials' errors at every step.

    Args:
        errors: by the point's name, then by method, [trials, steps + 1].
    """
    curves = {}
    for name, methods in errors.items():
        for method, values in methods.items():
            steps = _shown(values.shape[1] - 1)
            shown = values[:, steps]
            parts = {"mean": shown.mean(0), "min": shown.min(0), "max": shown.max(0)}
            curves[name, method] = {"step": steps, **parts}
    return curves


def of_rows(rows: Sequence[Mapping[str, str]]) -> Curves:
    """Returns the curves that the rows of figure1.csv hold."""
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in rows:
        curve = found.setdefault((f"{row['vary']}={row['setting']}", row["method"]), {})
        for name in ("step", "mean", "min", "max"):
            curve.setdefault(name, []).append(float(row[name]))
    return {key: {n: np.array(v) for n, v in curve.items()} for key, curve in found.items()}


def _shown(last: int) -> np.ndarray:
    """Returns the steps that the figure shows; the curve files hold all of them."""
    return np.unique(np.geomspace(FIRST_SHOWN, last, SHOWN_STEPS).round().astype(int))
