"""Prediction error after LoRA-ML and after standard retraining, for the shallow network.

A run folder holds, besides what every run folder holds: ``tables.md``, a table per sweep, and the
figures.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.runs import RunError, RunFolder
from experiments.lib.unused import cut, say
from experiments.synthetic.settings import Point, ShallowSettings
from experiments.synthetic.shallow_trials import METRICS, run_trials
from experiments.synthetic.trials import METHODS

EXPERIMENT = "shallow"


@dataclass(frozen=True)
class Summary:
    """A metric over the trials of one point: the median and the range of the central 6 in 10."""

    median: float
    low: float
    high: float


def main(argv: Sequence[str] | None = None, *, prog: str = "shallow") -> None:
    """The command: reads the settings, runs, prints the tables and where things are."""
    settings = cli.parse(ShallowSettings, argv, prog=prog, description=__doc__.splitlines()[0])
    with RunFolder.create(
        settings.out,
        settings,
        experiment=EXPERIMENT,
        tag=settings.vary,
        resume=settings.resume,
    ) as folder:
        figures = run(settings, folder)
    print(folder.path("tables.md").read_text(encoding="utf-8"))
    print(f"results: {folder.path('results.csv')}")
    for figure in figures:
        print(f"figure:  {figure}")


def run(settings: ShallowSettings, folder: RunFolder) -> list[Path]:
    """Runs the trials that are not yet in the folder, then writes the tables and the figures.

    Returns:
        The paths of the figures, the one with all sweeps (if all were run) first.

    Raises:
        RunError: a training diverged with these settings.
    """
    shortened = settings.shortened()
    say(cut(settings, shortened))
    settings = shortened
    points = settings.points()
    with tqdm(total=len(points) * settings.trials, unit="trial", disable=None) as progress:
        for point in points:
            progress.set_description(point.name)
            # As many at a time as run side by side: a run that is stopped loses little.
            for begin in range(0, settings.trials, torch.get_num_threads()):
                trials = range(settings.trials)[begin : begin + torch.get_num_threads()]
                missing = [t for t in trials if not folder.done(f"{point.name} trial {t}")]
                if missing:
                    _run_unit(point, settings, missing, folder)
                progress.update(len(trials))
    summaries = summarise(folder)
    folder.path("tables.md").write_text(tables(points, summaries), encoding="utf-8")
    from experiments.synthetic import shallow_figures  # matplotlib takes a second to import

    return shallow_figures.draw(points, summaries, settings.trials, folder)


def _run_unit(
    point: Point, settings: ShallowSettings, trials: Sequence[int], folder: RunFolder
) -> None:
    try:
        results = run_trials(point, settings, trials)
    except RuntimeError as error:
        if "diverged" not in str(error):
            raise
        raise RunError(f"{point.name}: {error}".replace("optimizer.lr", "--lr")) from error
    for i, trial in enumerate(trials):
        folder.add_rows(
            [
                {
                    "experiment": EXPERIMENT,
                    "vary": point.vary,
                    "setting": point.value,
                    "method": method,
                    "trial": trial,
                    "metric": metric,
                    "value": float(results[method][metric][i]),
                }
                for method in METHODS
                for metric in METRICS
            ]
        )
        errors = {m: float(results[m]["prediction_error"][i]) for m in METHODS}
        folder.log(vary=point.vary, setting=point.value, trial=trial, prediction_error=errors)
        folder.mark_done(f"{point.name} trial {trial}")


def summarise(folder: RunFolder) -> dict[tuple[str, str, str], Summary]:
    """By the point's name, the method and the metric."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in folder.rows():
        key = (f"{row['vary']}={row['setting']}", row["method"], row["metric"])
        values.setdefault(key, []).append(float(row["value"]))
    return {key: _summary(found) for key, found in values.items()}


def _summary(values: Sequence[float]) -> Summary:
    ordered = sorted(values)
    outside = len(ordered) // 5  # on either side
    central = ordered[outside : len(ordered) - outside]
    return Summary(statistics.median(ordered), central[0], central[-1])


def tables(points: Sequence[Point], summaries: dict[tuple[str, str, str], Summary]) -> str:
    """A Markdown table per sweep: median, and the range of the central 6 of 10 trials."""
    parts = []
    for vary in dict.fromkeys(point.vary for point in points):
        lines = [
            f"| {vary} | LoRA-ML | standard | standard / LoRA-ML | LoRA-ML, fresh inputs "
            "| standard, fresh inputs |",
            "| ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for point in (p for p in points if p.vary == vary):
            cells = [
                summaries[point.name, method, metric]
                for metric in METRICS[:2]
                for method in METHODS
            ]
            ratio = cells[1].median / cells[0].median
            texts = [f"{c.median:.3g} ({c.low:.3g} to {c.high:.3g})" for c in cells]
            row = [f"{point.value:,}", *texts[:2], f"{ratio:.1f}", *texts[2:]]
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
