"""Phase diagrams of exact recovery by LoRA-ML: over tasks T and k/d, over samples n and k.

Retraining minimises the population loss (paper, eq. 14), fine-tuning has n noiseless samples. A
trial succeeds if the relative error of Â, or of Â + U Vᵀ for the test task, is at most the
tolerance. One that fails while its loss is still falling may only need more steps: unfinished.

A run folder holds, besides what every run folder holds, the figure ``phase`` and its table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.runs import RunError, RunFolder
from experiments.lib.unused import cut, say
from experiments.synthetic.phase_settings import RETRAIN_TASKS, PhaseSettings
from experiments.synthetic.phase_trials import (
    METRICS,
    Outcome,
    recover_base,
    recover_test_task,
)

EXPERIMENT = "phase"
# A training is at its end with this much of its first loss, or if the last tenth of its steps took
# no more than this part of the loss that was left.
LEAST_LOSS, LEAST_PROGRESS = 1e-10, 0.01


@dataclass(frozen=True)
class Cell:
    """Fractions of a cell's trials.

    Attributes:
        success: that recovered the truth.
        unfinished: that did not, and whose loss was still falling.
    """

    success: float
    unfinished: float


Cells = dict[tuple[int, int], Cell]  # by T or n, and k


def main(argv: Sequence[str] | None = None, *, prog: str = "phase") -> None:
    """The command: reads the settings, runs, prints the tables and where things are."""
    description = __doc__.splitlines()[0]
    settings = cli.parse(PhaseSettings, argv, prog=prog, description=description)
    with RunFolder.create(
        settings.out, settings, experiment=EXPERIMENT, resume=settings.resume
    ) as folder:
        figure = run(settings, folder)
    for diagram in ("T", "n"):
        print(table(diagram, cells(diagram, settings.tolerance, folder)))
    print(f"results: {folder.path('results.csv')}")
    print(f"figure:  {figure}")


def run(settings: PhaseSettings, folder: RunFolder) -> Path:
    """Runs the cells that are not yet in the folder, then draws the diagrams.

    Returns:
        The path of the figure.

    Raises:
        RunError: a training diverged with these settings.
    """
    shortened = settings.shortened()
    say(cut(settings, shortened))
    settings = shortened
    units = [(t, k) for k in settings.ranks for t in settings.tasks] + [
        (None, k) for k in settings.ranks
    ]
    with tqdm(units, unit="cell", disable=None) as progress:
        for num_tasks, rank in progress:
            name = f"n k={rank}" if num_tasks is None else f"T={num_tasks} k={rank}"
            progress.set_description(name)
            if not folder.done(name):
                _run_unit(name, num_tasks, rank, settings, folder)
    from experiments.synthetic import phase_figures  # matplotlib takes a second to import

    over_tasks, over_samples = (cells(d, settings.tolerance, folder) for d in ("T", "n"))
    return phase_figures.draw(settings, over_tasks, over_samples, folder)


def _run_unit(
    name: str, num_tasks: int | None, rank: int, settings: PhaseSettings, folder: RunFolder
) -> None:
    """One cell of the diagram over T, or all n of one rank (``num_tasks`` None)."""
    try:
        if num_tasks is None:
            outcomes = recover_test_task(RETRAIN_TASKS, settings.samples, rank, settings)
        else:
            outcomes = {num_tasks: recover_base(num_tasks, rank, settings)}
    except RuntimeError as error:
        if "diverged" not in str(error):
            raise
        raise RunError(f"{name}: {error}") from error
    diagram = "n" if num_tasks is None else "T"
    for value, outcome in outcomes.items():
        folder.add_rows(_rows(diagram, value, rank, outcome, settings))
    folder.mark_done(name)


def _rows(
    diagram: str, value: int, rank: int, outcome: Outcome, settings: PhaseSettings
) -> list[dict[str, object]]:
    return [
        {
            "experiment": EXPERIMENT,
            "vary": diagram,
            "setting": value,
            "k": rank,
            "d": settings.dim,
            "trial": trial,
            "metric": metric,
            "value": float(outcome[metric][trial]),
        }
        for trial in range(settings.trials)
        for metric in METRICS
    ]


def cells(diagram: str, tolerance: float, folder: RunFolder) -> Cells:
    """The diagram over T or n, from results.csv."""
    values: dict[tuple[int, int], dict[str, list[float]]] = {}
    for row in folder.rows():
        if row["vary"] == diagram:
            metrics = values.setdefault((int(row["setting"]), int(row["k"])), {})
            metrics.setdefault(row["metric"], []).append(float(row["value"]))
    found = {}
    for place, metrics in values.items():
        success = [error <= tolerance for error in metrics["relative_error"]]
        unfinished = [
            not done and loss > LEAST_LOSS and progress > LEAST_PROGRESS
            for done, loss, progress in zip(
                success, metrics["remaining_loss"], metrics["late_progress"], strict=True
            )
        ]
        found[place] = Cell(sum(success) / len(success), sum(unfinished) / len(success))
    return found


def table(diagram: str, found: Cells) -> str:
    """Success in percent: a line per rank, the largest first; ``*`` where trials are unfinished."""
    columns = sorted({value for value, _ in found})
    lines = [f"{diagram + ' =':>7}" + "".join(f"{value:>6}" for value in columns)]
    for rank in sorted({rank for _, rank in found}, reverse=True):
        row = [found[value, rank] for value in columns]
        texts = [f"{100 * c.success:.0f}{'*' if c.unfinished else ' '}" for c in row]
        lines.append(f"{f'k = {rank}':>7}" + "".join(f"{text:>6}" for text in texts))
    return "\n".join(lines)
