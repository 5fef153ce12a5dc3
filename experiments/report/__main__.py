"""``python -m experiments.report``: see ``--help``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.lib import cli
from experiments.lib.errors import RunError
from experiments.report import pages, results


@dataclass(frozen=True)
class ReportSettings:
    """What to do; without a flag, all tables and figures are written."""

    add: tuple[str, ...] = cli.option(
        (), help="a run folder and a name: commit its numbers as experiments/results/NAME"
    )
    add_trials: tuple[str, ...] = cli.option(
        (), help="a run folder and a name: add its trials to those of experiments/results/NAME"
    )
    compare: tuple[str, ...] = cli.option(
        (), help="a run folder and a name: fail if numbers differ from experiments/results/NAME"
    )
    check: bool = cli.option(False, help="write nothing; fail if a page differs from the results")
    redraw: bool = cli.option(False, help="also draw figures whose numbers have not changed")

    def __post_init__(self) -> None:
        with_run = ("add", "add_trials", "compare")
        for name in with_run:
            if len(getattr(self, name)) not in (0, 2):
                flag = cli.flag_of(name)
                raise ValueError(f"argument {flag}: needs a run folder and a name of results")
        given = [name for name in (*with_run, "check", "redraw") if getattr(self, name)]
        if len(given) > 1:
            flags = ", ".join(map(cli.flag_of, given))
            raise ValueError(f"argument {flags}: give one of them")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Adds or compares a run, checks the pages, or writes them."""
    settings = cli.parse(
        ReportSettings,
        argv,
        prog="python -m experiments.report",
        description="Makes the tables and figures of README.md and docs/ from committed runs.",
    )
    for given, added in ((settings.add, results.add), (settings.add_trials, results.add_trials)):
        if given:
            run, name = given
            print(added(Path(run), name))
            return 0
    if settings.compare:
        run, name = settings.compare
        lines, equal = results.compare(Path(run), name)
        print(*lines, sep="\n")
        return 0 if equal else 1
    if not (pages.ROOT / "docs").is_dir():
        raise RunError(f"{pages.ROOT / 'docs'} is missing; the report needs a clone of metalora")
    with pages.Report(pages.ROOT, redraw=settings.redraw) as report:
        found = report.run(write=not settings.check)
        for name in report.missing:
            print(f"note: no results called {name} yet", file=sys.stderr)
    for line in found:
        print(line)
    return 1 if settings.check and found else 0


if __name__ == "__main__":
    main()
