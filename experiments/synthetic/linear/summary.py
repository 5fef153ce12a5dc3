"""The table of Figure 1, and the curves behind it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from experiments.lib.errors import RunError
from experiments.lib.runs import RunFolder
from experiments.lib.statistics import standard_error, with_error
from experiments.lib.tables import Table, three_digits
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.summary import comparison, grouped
from metalora._files import replacing

METRIC = "prediction_error"


def table(points: Sequence[Point], rows: Sequence[Mapping[str, str]]) -> str:
    """Returns a line per setting: the prediction error after the last step, with standard error."""
    lines = ["prediction error, mean (standard error)"]
    lines.append(f"{'setting':<12}{'LoRA-ML':>22}{'standard':>22}{'standard / LoRA-ML':>20}")
    values = grouped(rows)
    for point in points:
        of = [values[point.name, method, METRIC] for method in METHODS]
        ours, standard = (statistics.fmean(found) for found in of)
        cells = [with_error(statistics.fmean(v), standard_error(v), ".3g") for v in of]
        ratio = standard / ours if ours else math.inf
        lines.append(f"{point.name:<12}{cells[0]:>22}{cells[1]:>22}{ratio:>20,.1f}")
    return "\n".join(lines)


def results_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Returns the same for the documentation, with the paired difference to standard retraining."""
    caption = (
        "Prediction error on the test task after fine-tuning, mean (standard error) over the "
        "trials. So few trials of a skewed error make rough intervals."
    )
    return comparison(rows, METRIC, _mean_and_error, caption)


def _mean_and_error(values: Sequence[float]) -> tuple[float, str]:
    mean = statistics.fmean(values)
    return mean, f"{three_digits(mean)} ({three_digits(standard_error(values))})"


def save_curves(point: Point, errors: dict[str, Tensor], folder: RunFolder) -> None:
    """Keeps the prediction errors of a point's trials, [trials, steps + 1] for every method."""
    with replacing(_curve_file(point, folder)) as file:
        np.savez(file, **{method: values.numpy() for method, values in errors.items()})  # type: ignore[arg-type]


def load_curves(points: Sequence[Point], folder: RunFolder) -> dict[str, dict[str, np.ndarray]]:
    """Reads what `save_curves` wrote: by the point's name, then by method, [trials, steps + 1].

    Raises:
        RunError: a file is missing or damaged.
    """
    curves = {}
    for point in points:
        try:
            with np.load(_curve_file(point, folder)) as file:
                curves[point.name] = {method: file[method] for method in METHODS}
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{_curve_file(point, folder)} cannot be read: {error}") from error
    return curves


def _curve_file(point: Point, folder: RunFolder) -> Path:
    return folder.path("curves") / f"{point.name}.npz"
