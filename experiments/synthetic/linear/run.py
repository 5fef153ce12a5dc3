"""The command: every sweep of Figure 1 that was asked for.

A run folder holds, besides what every run folder holds: ``curves/<vary>=<value>.npz`` with the
prediction error before the first and after every step of fine-tuning, one array
[trials, steps + 1] per method, and the figures.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from experiments.lib.experiment import Experiment, Report, Work, each_unit
from experiments.lib.runs import RunFiles, RunFolder, read_rows
from experiments.lib.unused import cut
from experiments.synthetic import linear
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.linear.summary import (
    METRIC,
    load_curves,
    results_table,
    save_curves,
    table,
)
from experiments.synthetic.linear.trials import run_point
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.summary import row

NAME = "linear"
CURVES = "figure1.csv"  # the numbers behind the figure of all sweeps


def prepare(given: LinearSettings) -> Work:
    """Prepares the sweeps; every point of theirs is a unit of work."""
    settings = given.shortened()
    points = settings.points()

    def trials(folder: RunFolder) -> None:
        units = {point.name: partial(_run_unit, point, settings, folder) for point in points}
        each_unit(folder, "setting", units, "--outer-lr, --inner-lr or --finetune-lr")

    def drawn(folder: RunFolder) -> list[Path]:
        from experiments.synthetic.linear import figures  # matplotlib takes a second to import

        curves = figures.of_trials(load_curves(points, folder))
        return figures.draw(points, curves, settings.trials, folder)

    return Work(
        given,
        trials,
        lambda folder: table(points, folder.rows()),
        drawn,
        tag=given.vary,
        notes=cut(given, settings),
    )


def _run_unit(point: Point, settings: LinearSettings, folder: RunFolder) -> dict[str, str]:
    """Runs the trials of a point and returns each method's mean error, for the progress bar."""
    errors = run_point(point, settings)
    save_curves(point, errors, folder)
    folder.add_rows(
        [
            row(NAME, point, method, trial, METRIC, errors[method][trial, -1])
            for method in METHODS
            for trial in range(settings.trials)
        ]
    )
    final = {method: float(errors[method][:, -1].mean()) for method in METHODS}
    folder.log(vary=point.vary, setting=point.value, mean_prediction_error=final)
    return {method: f"{error:.3g}" for method, error in final.items()}


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.synthetic.linear import figures

    settings = run.settings(LinearSettings).shortened()
    curves = figures.of_rows(read_rows(run.path(CURVES)))
    return figures.draw(settings.points(), curves, settings.trials, run)


LINEAR = Experiment(
    NAME,
    linear.__doc__ or "",
    LinearSettings,
    prepare,
    Report(lambda run: {"": results_table(run.rows())}, _figures_of_results, files=(CURVES,)),
)
