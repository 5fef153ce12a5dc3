"""The command: checks the statements, and ends with a table of verdicts.

A run folder holds, besides what every run folder holds: ``statement-<number>.json`` with the checks
of a statement and the numbers behind its figure (in that of 11 are the spurious minimum and the
seed that found it), and the figures. A row of results.csv is one check.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from experiments.lib.experiment import Experiment, Report, Work, command, each_unit
from experiments.lib.machine import one_thread
from experiments.lib.runs import RunFolder
from experiments.lib.unused import unused
from experiments.theory.checks import Outcome
from experiments.theory.settings import PART_OF, TheorySettings
from experiments.theory.statements import ALL, CONTROLS, STATEMENTS
from experiments.theory.summary import load_outcome, results_table, table, verdict

NAME = "theory"


def prepare(settings: TheorySettings) -> Work:
    """Prepares the statements, each a unit of work; those wrong on purpose come first."""
    chosen = [name for name in (*CONTROLS, *STATEMENTS) if name in settings.statements]

    def trials(folder: RunFolder) -> None:
        with one_thread():
            units = {name: partial(_run_unit, name, settings, folder) for name in chosen}
            each_unit(folder, "statement", units, "--outer-lr or --inner-lr")

    def outcomes(folder: RunFolder) -> dict[str, Outcome]:
        return {name: load_outcome(name, folder) for name in chosen}

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.theory.figures import draw  # matplotlib takes a second to import

        return draw(outcomes(folder), folder)

    def holds(folder: RunFolder) -> bool:
        found = outcomes(folder)
        return all(found[name].holds == (name in STATEMENTS) for name in chosen)

    return Work(
        settings,
        trials,
        lambda folder: table(outcomes(folder)),
        figures,
        notes=unused(settings, PART_OF, set(chosen)),
        holds=holds,
    )


def _run_unit(name: str, settings: TheorySettings, folder: RunFolder) -> dict[str, str]:
    outcome = ALL[name].check(settings)
    folder.write_json(
        f"statement-{name}.json",
        {"checks": [asdict(c) for c in outcome.checks], "data": outcome.data},
    )
    folder.add_rows(
        [
            {"experiment": NAME, "statement": name, "verdict": verdict(outcome)} | asdict(c)
            for c in outcome.checks
        ]
    )
    folder.log(statement=name, verdict=verdict(outcome), checks=len(outcome.checks))
    return {name: verdict(outcome)}


THEORY = Experiment(
    NAME,
    "Checks the paper's theory of the linear model numerically.",
    TheorySettings,
    prepare,
    Report(lambda run: {"": results_table(run.rows())}),
)
main = command("python -m experiments.theory", THEORY)
