"""Figure 1: prediction error after LoRA-ML and after standard retraining, for the linear model.

A run folder holds, besides what every run folder holds: ``curves/<vary>=<value>.npz`` with the
prediction error before the first and after every step of fine-tuning, one array
[trials, steps + 1] per method, and the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.runs import RunError, RunFolder
from experiments.lib.unused import cut, say
from experiments.synthetic.settings import LinearSettings, Point
from experiments.synthetic.trials import METHODS, run_point
from metalora._files import replacing

EXPERIMENT = "linear"


def main(argv: Sequence[str] | None = None, *, prog: str = "linear") -> None:
    """The command: reads the settings, runs, prints the table and where things are."""
    settings = cli.parse(LinearSettings, argv, prog=prog, description=__doc__.splitlines()[0])
    with RunFolder.create(
        settings.out,
        settings,
        experiment=EXPERIMENT,
        tag=settings.vary,
        resume=settings.resume,
    ) as folder:
        figures = run(settings, folder)
    print(table(settings, folder))
    print(f"results: {folder.path('results.csv')}")
    for figure in figures:
        print(f"figure:  {figure}")


def run(settings: LinearSettings, folder: RunFolder) -> list[Path]:
    """Runs the sweeps that are not yet in the folder, then draws the figures.

    Returns:
        The paths of the figures, the one with all sweeps (if all were run) first.

    Raises:
        RunError: a training diverged with these settings.
    """
    shortened = settings.shortened()
    say(cut(settings, shortened))
    settings = shortened
    points = settings.points()
    with tqdm(points, unit="setting", disable=None) as progress:
        for point in progress:
            progress.set_description(point.name)
            if not folder.done(point.name):
                errors = _run_unit(point, settings, folder)
                means = {m: f"{float(errors[m][:, -1].mean()):.3g}" for m in METHODS}
                progress.set_postfix(means)
    from experiments.synthetic import figures  # matplotlib takes a second to import

    return figures.draw(points, load_curves(points, folder), folder)


def _run_unit(point: Point, settings: LinearSettings, folder: RunFolder) -> dict[str, Tensor]:
    try:
        errors = run_point(point, settings)
    except RuntimeError as error:
        if "diverged" not in str(error):
            raise
        raise RunError(f"{point.name}: {error}") from error
    _save_curves(_curve_file(point, folder), errors)
    folder.add_rows(
        [
            {
                "experiment": EXPERIMENT,
                "vary": point.vary,
                "setting": point.value,
                "method": method,
                "trial": trial,
                "metric": "prediction_error",
                "value": float(errors[method][trial, -1]),
            }
            for method in METHODS
            for trial in range(settings.trials)
        ]
    )
    final = {method: float(errors[method][:, -1].mean()) for method in METHODS}
    folder.log(vary=point.vary, setting=point.value, mean_prediction_error=final)
    folder.mark_done(point.name)
    return errors


def load_curves(points: Sequence[Point], folder: RunFolder) -> dict[str, dict[str, np.ndarray]]:
    """The curves of a finished run: by the point's name, then by method, [trials, steps + 1]."""
    curves = {}
    for point in points:
        try:
            with np.load(_curve_file(point, folder)) as file:
                curves[point.name] = {method: file[method] for method in METHODS}
        except (OSError, ValueError, KeyError) as error:
            raise RunError(f"{_curve_file(point, folder)} cannot be read: {error}") from error
    return curves


def table(settings: LinearSettings, folder: RunFolder) -> str:
    """Mean prediction error after the last step: a line per setting."""
    lines = [f"{'setting':>9}  {'LoRA-ML':>10}  {'standard':>10}  {'standard / LoRA-ML':>18}"]
    rows = folder.rows()
    for point in settings.points():
        means = []
        for method in METHODS:
            key = (point.vary, str(point.value), method)
            values = [
                float(r["value"]) for r in rows if (r["vary"], r["setting"], r["method"]) == key
            ]
            means.append(float(np.mean(values)))
        ours, standard = means
        ratio = standard / ours if ours else float("inf")
        lines.append(f"{point.name:>9}  {ours:>10.3g}  {standard:>10.3g}  {ratio:>18,.1f}")
    return "\n".join(lines)


def _curve_file(point: Point, folder: RunFolder) -> Path:
    return folder.path("curves") / f"{point.name}.npz"


def _save_curves(path: Path, errors: dict[str, Tensor]) -> None:
    with replacing(path) as file:
        np.savez(file, **{method: values.numpy() for method, values in errors.items()})  # type: ignore[arg-type]
