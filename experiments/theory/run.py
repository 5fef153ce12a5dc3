"""The command: checks the statements, writes the run folder, ends with a table of verdicts.

A run folder holds, besides what every run folder holds: ``statement-<number>.json`` with the checks
of a statement and the numbers behind its figure (in that of 11 are the spurious minimum and the
seed that found it), and the figures. A row of results.csv is one check.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.runs import RunError, RunFolder, one_thread
from experiments.lib.unused import say, unused
from experiments.theory.checks import Check, Outcome
from experiments.theory.settings import PART_OF, TheorySettings
from experiments.theory.statements import CONTROLS, STATEMENTS

EXPERIMENT = "theory"
_ALL = {**STATEMENTS, **CONTROLS}


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the checks as a command; 1 if a verdict is not as the paper says, else 0."""
    settings = cli.parse(
        TheorySettings,
        argv,
        prog="python -m experiments.theory",
        description="Checks the paper's theory of the linear model numerically.",
    )
    with RunFolder.create(
        settings.out, settings, experiment=EXPERIMENT, resume=settings.resume
    ) as folder:
        outcomes, figures = run(settings, folder)
    for figure in figures:
        print(f"figure:  {figure}")
    print(f"results: {folder.path('results.csv')}\n")
    print(table(outcomes))
    return 0 if all(o.holds == (name in STATEMENTS) for name, o in outcomes.items()) else 1


def run(settings: TheorySettings, folder: RunFolder) -> tuple[dict[str, Outcome], list[Path]]:
    """Checks the statements that are not yet in the folder, then draws the figures.

    Returns:
        The outcome of each statement, controls first, and the paths of the figures.

    Raises:
        RunError: a training diverged with these settings, or a file of the folder is damaged.
    """
    say(unused(settings, PART_OF, set(settings.statements)))
    chosen = [name for name in (*CONTROLS, *STATEMENTS) if name in settings.statements]
    outcomes = {}
    with tqdm(chosen, unit="statement", disable=None) as progress, one_thread():
        for name in progress:
            progress.set_description(f"statement {name}")
            if not folder.done(name):
                _run_unit(name, settings, folder)
            outcomes[name] = load_outcome(name, folder)
            progress.set_postfix({name: verdict(outcomes[name])})
    from experiments.theory import figures  # matplotlib takes a second to import

    return outcomes, figures.draw(outcomes, folder)


def _run_unit(name: str, settings: TheorySettings, folder: RunFolder) -> None:
    try:
        outcome = _ALL[name].check(settings)
    except RuntimeError as error:
        if "diverged" not in str(error):
            raise
        raise RunError(f"statement {name}: {error}") from error
    folder.write_json(
        f"statement-{name}.json",
        {"checks": [asdict(c) for c in outcome.checks], "data": outcome.data},
    )
    folder.add_rows(
        [
            {"experiment": EXPERIMENT, "statement": name, "verdict": verdict(outcome)} | asdict(c)
            for c in outcome.checks
        ]
    )
    folder.log(statement=name, verdict=verdict(outcome), checks=len(outcome.checks))
    folder.mark_done(name)


def load_outcome(name: str, folder: RunFolder) -> Outcome:
    """The outcome of a statement that a run has checked.

    Raises:
        RunError: its file is missing or damaged.
    """
    path = folder.path(f"statement-{name}.json")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Outcome([Check(**check) for check in stored["checks"]], stored["data"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} cannot be read: {error}; start a new run") from error


def verdict(outcome: Outcome) -> str:
    """What an outcome says of its statement: verified or refuted."""
    return "verified" if outcome.holds else "refuted"


def table(outcomes: dict[str, Outcome]) -> str:
    """A line per statement: claim, prediction, measurement, verdict; the wrong ones come first.

    Prediction and measurement are those of the statement's first check, or of the first that
    failed; results.csv has all.
    """
    lines = []
    for title, group in (("wrong on purpose", CONTROLS), ("statement", STATEMENTS)):
        rows = [(name, s) for name, s in group.items() if name in outcomes]
        if not rows:
            continue
        claim = max(len(s.claim) for s in _ALL.values())
        lines.append(
            f"{title:<{claim + 22}}{'predicted':<26}{'measured':<30}{'checks':>7}  verdict"
        )
        for name, statement in rows:
            outcome = outcomes[name]
            shown = outcome.headline
            held = f"{sum(c.holds for c in outcome.checks)}/{len(outcome.checks)}"
            lines.append(
                f"{name:<9}{statement.source:<11}{statement.claim:<{claim + 2}}"
                f"{shown.predicted:<26}{shown.shown:<30}{held:>7}  {verdict(outcome)}"
            )
            lines.append(f"{'':<20}{shown.what}")
        lines.append("")
    return "\n".join(lines).rstrip()
