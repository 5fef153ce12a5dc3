"""The table of Figure 1, and the curves behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from experiments.lib.errors import RunError
from experiments.lib.runs import RunFolder
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.summary import grouped
from metalora._files import replacing

METRIC = "prediction_error"


def table(points: Sequence[Point], rows: Sequence[Mapping[str, str]]) -> str:
    """Mean prediction error after the last step: a line per setting."""
    lines = [f"{'setting':>9}  {'LoRA-ML':>10}  {'standard':>10}  {'standard / LoRA-ML':>18}"]
    values = grouped(rows)
    for point in points:
        ours, standard = (float(np.mean(values[point.name, m, METRIC])) for m in METHODS)
        ratio = standard / ours if ours else float("inf")
        lines.append(f"{point.name:>9}  {ours:>10.3g}  {standard:>10.3g}  {ratio:>18,.1f}")
    return "\n".join(lines)


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
