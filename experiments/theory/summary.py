"""What a run found: the outcome of every statement as it is stored, and the table of verdicts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from experiments.lib.errors import RunError
from experiments.lib.runs import RunFolder
from experiments.lib.tables import Table
from experiments.theory.checks import Check, Outcome
from experiments.theory.statements import ALL, CONTROLS, STATEMENTS


def load_outcome(name: str, folder: RunFolder) -> Outcome:
    """Reads the outcome of a statement that a run has checked.

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
    """Returns what an outcome says of its statement: verified or refuted."""
    return "verified" if outcome.holds else "refuted"


def table(outcomes: Mapping[str, Outcome]) -> str:
    """Returns a line per statement: claim, prediction, measurement, verdict; the wrong ones first.

    Prediction and measurement are those of the statement's first check, or of the first that
    failed; results.csv has all.
    """
    lines = []
    for title, group in (("wrong on purpose", CONTROLS), ("statement", STATEMENTS)):
        rows = [(name, s) for name, s in group.items() if name in outcomes]
        if not rows:
            continue
        claim = max(len(s.claim) for s in ALL.values())
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


def results_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Returns the verdicts for the documentation, the wrong statements last.

    Args:
        rows: of results.csv.
    """
    lines = []
    for name, statement in (*STATEMENTS.items(), *CONTROLS.items()):
        checks = [_check(row) for row in rows if row["statement"] == name]
        if not checks:
            continue
        outcome = Outcome(checks)
        shown = outcome.headline
        held = f"{sum(c.holds for c in checks)} of {len(checks)}"
        number = name if name in STATEMENTS else ""
        claim = f"{statement.source}: {statement.claim}"
        lines.append([number, claim, shown.predicted, shown.shown, held, verdict(outcome)])
    caption = (
        "Prediction and measurement are those of a statement's first check, or of the first that "
        "failed; intervals hold with 99.99 %. What holds for random cases is shown for those drawn."
    )
    header = ["", "statement", "predicted", "measured", "checks met", "verdict"]
    return Table(
        header, [[_escaped(cell) for cell in line] for line in lines], caption, left=len(header)
    )


def _check(row: Mapping[str, str]) -> Check:
    measured, low, high = (float(row[name]) for name in ("measured", "low", "high"))
    return Check(row["what"], row["predicted"], measured, low, high, row["holds"] == "True")


def _escaped(text: str) -> str:
    """Returns a text in which Markdown takes no sign for one of its own."""
    return re.sub(r"([*_|<])", r"\\\1", text)
