"""What every experiment is: settings, work in a run folder, a table, figures, and a command."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from tqdm import tqdm

from experiments.lib import cli, processes
from experiments.lib.errors import RunError, divergence
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.tables import Table
from experiments.lib.units import RESULTS
from experiments.lib.unused import say


@dataclass(frozen=True)
class RunSettings:
    """Settings that every experiment has."""

    smoke: bool = cli.option(False, help="a run of seconds, to see that everything works")
    out: Path | None = cli.option(None, run_only=True, help="run folder (default: one in runs/)")
    resume: bool = cli.option(False, run_only=True, help="go on with the run in --out")


Settings = TypeVar("Settings", bound=RunSettings)


@dataclass(frozen=True)
class Work:
    """A run that is ready to start: everything that can be checked beforehand has been checked.

    Attributes:
        settings: for the manifest; a run is only resumed with the same.
        trials: does the units of work that the folder does not hold yet.
        table: returns the summary of the folder's numbers as text.
        figures: draws into the folder and returns the paths of the PNG files.
        tag: what tells this run from others of the experiment, in the name of its folder.
        notes: lines for stderr, such as those of `experiments.lib.unused`.
        holds: whether the numbers are as they must be; if not, the command's exit code is 1.
    """

    settings: RunSettings
    trials: Callable[[RunFolder], Any]
    table: Callable[[RunFolder], str]
    figures: Callable[[RunFolder], list[Path]]
    tag: str = ""
    notes: Sequence[str] = ()
    holds: Callable[[RunFolder], bool] = field(default=lambda folder: True)


@dataclass(frozen=True)
class Report:
    """What the documentation shows of a committed run, see `experiments.report`.

    Attributes:
        tables: returns the tables by name; the name of the main one is "".
        figures: draws into the folder and returns the paths of the PNG files.
        files: what the tables and figures need besides results.csv and manifest.json.
    """

    tables: Callable[[RunFiles], Mapping[str, Table]]
    figures: Callable[[RunFiles], list[Path]] = lambda run: []
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment(Generic[Settings]):
    """An experiment: its name, a description in one sentence, its settings, and its preparation.

    Attributes:
        prepare: turns settings into `Work`. It raises `RunError` for data, devices and the like
            that cannot be used; the run folder does not exist yet.
        report: its tables and figures in the documentation, if there are any.
    """

    name: str
    description: str
    settings: type[Settings]
    prepare: Callable[[Settings], Work]
    report: Report | None = None

    def run(self, settings: Settings, *, go_on: str = "") -> RunFolder:
        """Runs the experiment, or goes on with it, and returns its folder with all figures made.

        Args:
            settings: as given; ``out`` and ``resume`` choose the folder.
            go_on: see `RunFolder.create`.

        Raises:
            RunError: what the settings name cannot be used, or a training diverged.
        """
        return self._run(self.prepare(settings), settings, go_on)[0]

    def show(self, settings: Settings) -> int:
        """Runs the experiment, prints its table and where things are; returns the exit code."""
        if processes.launched() and not hasattr(settings, "parallel"):
            raise RunError(f"{self.name} trains in one process; start it without torchrun")
        work = processes.first_alone(lambda: self.prepare(settings))
        folder, figures = self._run(work, settings, "")
        if processes.rank() > 0:
            return 0
        print(work.table(folder))
        print(f"results: {folder.path(RESULTS)}")
        for figure in figures:
            print(f"figure:  {figure}")
        return 0 if work.holds(folder) else 1

    def _run(self, work: Work, settings: Settings, go_on: str) -> tuple[RunFolder, list[Path]]:
        create = partial(
            RunFolder.create,
            settings.out,
            work.settings,
            experiment=self.name,
            tag=work.tag,
            go_on=go_on,
        )
        with processes.open_folder(create, settings.out, settings.resume) as folder:
            writes = processes.rank() == 0
            if writes:
                say(work.notes)
            if processes.launched():
                folder.note(processes=processes.count())
            work.trials(folder)
            return folder, work.figures(folder) if writes else []


def each_unit(
    folder: RunFolder,
    kind: str,
    units: Mapping[str, Callable[[], Mapping[str, str] | None]],
    rates: str,
) -> None:
    """Does the units of work that the folder does not hold yet, and shows a progress bar.

    Args:
        folder: the run's.
        kind: what a unit is called, such as "cell".
        units: by name, a function that does the unit and returns what to show beside the bar.
        rates: the flags to lower if a training diverges.

    Raises:
        RunError: a training diverged.
    """
    with tqdm(units.items(), unit=kind, disable=processes.no_bar()) as progress:
        for name, work in progress:
            progress.set_description(name)
            if not folder.done(name):
                with divergence(f"{kind} {name}", rates):
                    progress.set_postfix(work())
                folder.mark_done(name)


def command(prog: str, *experiments: Experiment[Any]) -> Callable[..., NoReturn]:
    """Makes the main function of a command that runs an experiment.

    Of several experiments the command's first argument names the one to run.
    """

    @cli.main_guard
    def main(argv: Sequence[str] | None = None) -> int:
        if len(experiments) == 1:
            (only,) = experiments
            settings = cli.parse(only.settings, argv, prog=prog, description=only.description)
        else:
            commands = {e.name: (e.settings, e.description) for e in experiments}
            settings = cli.parse_command(commands, argv, prog=prog)
            only = next(e for e in experiments if type(settings) is e.settings)
        with processes.together():
            return only.show(settings)

    return main
