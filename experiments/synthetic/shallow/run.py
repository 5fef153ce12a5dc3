"""The command: every trial of the sweeps that were asked for.

A run folder holds, besides what every run folder holds: ``tables.md``, a table per sweep, and the
figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.lib.errors import divergence
from experiments.lib.experiment import Experiment, Report, Work
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.tables import Table
from experiments.lib.unused import cut
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.shallow.settings import ShallowSettings
from experiments.synthetic.shallow.summary import METRICS, results_table, summarise, tables
from experiments.synthetic.shallow.trials import run_trials
from experiments.synthetic.summary import row

NAME = "shallow"
TABLES = "tables.md"


def prepare(given: ShallowSettings) -> Work:
    """Prepares the sweeps; every trial of every point is a unit of work."""
    settings = given.shortened()
    points = settings.points()
    together = torch.get_num_threads()  # trials run side by side; a run that is stopped loses few

    def trials(folder: RunFolder) -> None:
        with tqdm(total=len(points) * settings.trials, unit="trial", disable=None) as progress:
            for point in points:
                progress.set_description(point.name)
                for begin in range(0, settings.trials, together):
                    group = range(settings.trials)[begin : begin + together]
                    missing = [t for t in group if not folder.done(f"{point.name} trial {t}")]
                    if missing:
                        _run_unit(point, settings, missing, folder)
                    progress.update(len(group))
        folder.path(TABLES).write_text(tables(points, summarise(folder.rows())), encoding="utf-8")

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.synthetic.shallow.figures import draw  # matplotlib: a second to import

        return draw(points, summarise(folder.rows()), settings.trials, folder)

    return Work(
        given,
        trials,
        lambda folder: folder.path(TABLES).read_text(encoding="utf-8"),
        figures,
        tag=given.vary,
        notes=cut(given, settings),
    )


def _run_unit(
    point: Point, settings: ShallowSettings, trials: Sequence[int], folder: RunFolder
) -> None:
    with divergence(point.name, "--lr"):
        results = run_trials(point, settings, trials)
    for i, trial in enumerate(trials):
        folder.add_rows(
            [
                row(NAME, point, method, trial, metric, results[method][metric][i])
                for method in METHODS
                for metric in METRICS
            ]
        )
        errors = {m: float(results[m]["prediction_error"][i]) for m in METHODS}
        folder.log(vary=point.vary, setting=point.value, trial=trial, prediction_error=errors)
        folder.mark_done(f"{point.name} trial {trial}")


def _tables_of_results(run: RunFiles) -> dict[str, Table]:
    rows, (own, fresh) = run.rows(), METRICS[:2]
    return {
        "": results_table(rows, own, "on its n inputs"),
        "fresh": results_table(rows, fresh, "on 10,000 fresh inputs"),
    }


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.synthetic.shallow.figures import draw

    settings = run.settings(ShallowSettings).shortened()
    return draw(settings.points(), summarise(run.rows()), settings.trials, run)


SHALLOW = Experiment(
    NAME,
    "Prediction error after LoRA-ML and after standard retraining, for the shallow network.",
    ShallowSettings,
    prepare,
    Report(_tables_of_results, _figures_of_results),
)
