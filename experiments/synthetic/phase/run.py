"""The command: the diagram over T and k/d, and the diagram over n and k.

Retraining minimises the population loss (paper, eq. 14), fine-tuning has n noiseless samples. A
trial succeeds if the relative error of Â, or of Â + U Vᵀ for the test task, is at most the
tolerance. One that fails while its loss is still falling may only need more steps: unfinished.

A run folder holds, besides what every run folder holds, the figure ``phase`` and its table.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from experiments.lib.experiment import Experiment, Report, Work, each_unit
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.tables import Table
from experiments.lib.unused import cut
from experiments.synthetic import phase
from experiments.synthetic.phase.settings import RETRAIN_TASKS, PhaseSettings
from experiments.synthetic.phase.summary import METRICS, Cells, cells, results_table, table
from experiments.synthetic.phase.trials import recover_base, recover_test_task

NAME = "phase"


def prepare(given: PhaseSettings) -> Work:
    """Prepares both diagrams; a unit is a cell of that over T, or all n of a rank (T is None)."""
    settings = given.shortened()

    def trials(folder: RunFolder) -> None:
        over_tasks = [(t, k) for k in settings.ranks for t in settings.tasks]
        units = {f"T={t} k={k}": partial(_run_unit, t, k, settings, folder) for t, k in over_tasks}
        for k in settings.ranks:
            units[f"n k={k}"] = partial(_run_unit, None, k, settings, folder)
        each_unit(folder, "cell", units, "--outer-lr, --inner-lr or --finetune-lr")

    def diagram(vary: str, folder: RunFolder) -> Cells:
        return cells(vary, settings.tolerance, folder.rows())

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.synthetic.phase.figures import draw  # matplotlib takes a second to import

        return [draw(settings, diagram("T", folder), diagram("n", folder), folder)]

    return Work(
        given,
        trials,
        lambda folder: "\n".join(table(vary, diagram(vary, folder)) for vary in ("T", "n")),
        figures,
        notes=cut(given, settings),
    )


def _run_unit(num_tasks: int | None, rank: int, settings: PhaseSettings, folder: RunFolder) -> None:
    if num_tasks is None:
        outcomes = recover_test_task(RETRAIN_TASKS, settings.samples, rank, settings)
    else:
        outcomes = {num_tasks: recover_base(num_tasks, rank, settings)}
    folder.add_rows(
        [
            {
                "experiment": NAME,
                "vary": "n" if num_tasks is None else "T",
                "setting": value,
                "k": rank,
                "d": settings.dim,
                "trial": trial,
                "metric": metric,
                "value": float(outcome[metric][trial]),
            }
            for value, outcome in outcomes.items()
            for trial in range(settings.trials)
            for metric in METRICS
        ]
    )


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.synthetic.phase.figures import draw

    settings = run.settings(PhaseSettings).shortened()
    tasks, samples = (cells(vary, settings.tolerance, run.rows()) for vary in ("T", "n"))
    return [draw(settings, tasks, samples, run)]


def _tables_of_results(run: RunFiles) -> dict[str, Table]:
    tolerance = run.settings(PhaseSettings).tolerance
    return {vary: results_table(vary, cells(vary, tolerance, run.rows())) for vary in ("T", "n")}


PHASE = Experiment(
    NAME,
    phase.__doc__ or "",
    PhaseSettings,
    prepare,
    Report(_tables_of_results, _figures_of_results),
)
