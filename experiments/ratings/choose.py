"""Chooses the weight decays on validation users.

``python -m experiments.ratings.choose --data-root DIR`` retrains with every candidate, fine-tunes
for the validation users with every decay, and prints the best, see `experiments.ratings.decays`. It
also says how many of the choices lie at an end of the grid, beyond which there may be a better one.
With several ``--tasks`` or ``--rank`` it chooses for each; ``--decays-from`` of the main command
takes what it has found.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from experiments.lib.cli import flag_of, option_of
from experiments.lib.experiment import Experiment, Report, Work, command, each_unit
from experiments.lib.machine import choose_device, one_thread
from experiments.lib.runs import RunFolder
from experiments.lib.tables import NAMES, Table
from experiments.lib.training import Labels
from experiments.ratings.data import Ratings
from experiments.ratings.decays import (
    CHOICE,
    FINETUNE_GRID,
    GRID,
    best,
    best_decays,
    candidates,
    name,
    tried,
)
from experiments.ratings.run import RANK_WARNING, check, load_ratings, trainings
from experiments.ratings.settings import DEFAULTS, SMOKE, USER_BIAS, RatingsSettings
from experiments.ratings.summary import RMSE, TITLES, as_text, ends_counted
from experiments.ratings.trials import Trials

COLUMNS = (
    *("experiment", "method", "tasks", "rank", "candidate", "finetune", "finetune_rank"),
    *("finetune_weight_decay", "shots", "trial", "metric", "value"),
)


@dataclasses.dataclass(frozen=True)
class ChooseSettings(RatingsSettings):
    """Settings of a choice; those that the grids hold are not given."""

    command: ClassVar[str] = "choose"

    # A unit of work has all of these, so no more can come when a run is resumed.
    finetune: tuple[str, ...] = option_of(RatingsSettings, "finetune", extends=False)
    shots: tuple[int, ...] = option_of(RatingsSettings, "shots", extends=False)
    rank: tuple[int, ...] = option_of(RatingsSettings, "rank", extends=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        held = {setting for grid in GRID.values() for setting in grid}
        for field in dataclasses.fields(self):
            chosen = field.name in {*held, "finetune_weight_decay", "decays_from"}
            if chosen and getattr(self, field.name) != field.default:
                raise ValueError(f"argument {flag_of(field.name)}: the grid holds it; leave it out")

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        own = {"seeds": 1, "shots": (5, 20)}
        return {**SMOKE, "seeds": 1} if self.smoke else {**DEFAULTS, **own}


def prepare(given: ChooseSettings) -> Work:
    """Loads the ratings; every candidate of every trial is a unit of work."""
    device = choose_device(given.device)
    settings = dataclasses.replace(given.resolved(device.type), users="validation")
    ratings = load_ratings(settings)
    notes = check(settings, ratings, device)

    def run(folder: RunFolder) -> None:
        folder.add_data("ratings", ratings.sha256)
        units = {unit.name: unit for unit in _units(folder, settings, ratings, device)}
        with one_thread(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=RANK_WARNING)
            each_unit(folder, "candidate", units, "--lr or --finetune-lr")

    return Work(
        settings,
        run,
        lambda folder: as_text([table(folder.rows())]),
        lambda folder: [],
        notes=notes,
    )


def _units(
    folder: RunFolder, settings: ChooseSettings, ratings: Ratings, device: torch.device
) -> Iterator[_Unit]:
    for trial in settings.trials:
        for tasks in settings.tasks:
            for labels, after in trainings(settings, tasks, trial):
                for candidate in candidates(labels["method"], labels["rank"], settings.smoke):
                    yield _Unit(folder, settings, ratings, device, labels, after, candidate)


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Retrains with a candidate, and fine-tunes with every decay."""

    folder: RunFolder
    settings: ChooseSettings
    ratings: Ratings
    device: torch.device
    labels: Labels
    after: Sequence[Labels]
    candidate: Mapping[str, Any]

    @property
    def name(self) -> str:
        words = (str(v) for v in self.labels.values() if v is not None)
        return f"{' '.join(words)} {name(self.candidate)}"

    def __call__(self) -> dict[str, str]:
        s = dataclasses.replace(RatingsSettings(**_fields(self.settings)), **self.candidate)
        method, trial = self.labels["method"], self.labels["trial"]
        trials = Trials(s, self.ratings, self.labels["tasks"], trial, self.device)
        model, _ = trials.retrain(method, trial, rank=self.labels["rank"])
        rows = []
        for labels in self.after:
            kind, rank = labels["finetune"], labels["rank"]
            if kind == USER_BIAS:
                continue
            decays = FINETUNE_GRID[kind] if rank != 0 else FINETUNE_GRID[kind][:1]
            for decay in decays:
                trials.settings = dataclasses.replace(s, finetune_weight_decay=decay)
                found = trials.finetune(copy.deepcopy(model), labels)
                rows.append(
                    {
                        "experiment": CHOICE,
                        **{k: "" if v is None else v for k, v in self.labels.items()},
                        "candidate": name(self.candidate),
                        "finetune": kind,
                        "finetune_rank": "" if rank is None else rank,
                        "finetune_weight_decay": decay,
                        "shots": labels["shots"],
                        "metric": RMSE,
                        "value": next(row["value"] for row in found if row["metric"] == RMSE),
                    }
                )
        self.folder.add_rows([{column: row[column] for column in COLUMNS} for row in rows])
        return {}


def _fields(settings: RatingsSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(RatingsSettings)}


def table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Returns a line for each candidate."""
    rows = list(rows)
    found = tried(rows)
    chosen = best(found)
    kinds = list(
        dict.fromkeys(
            kind
            for candidates_of in found.values()
            for errors in candidates_of.values()
            for kind, _ in errors
        )
    )
    several = [
        place for place in (1, 2) if len({retraining[place] for retraining in found} - {""}) > 1
    ]
    ends = ends_counted(best_decays(rows).ends)
    lines = []
    for retraining, candidates_of in found.items():
        for candidate, errors in candidates_of.items():
            cells = []
            for kind in kinds:
                of_ranks = [(r, *values) for (k, r), values in errors.items() if k == kind]
                ranked = len(of_ranks) > 1
                cells.append(
                    ", ".join(
                        (f"rank {rank}: " if ranked else "") + f"{value:.4f} ({decay})"
                        for rank, value, decay in of_ranks
                    )
                )
            mark = "chosen" if chosen[retraining] == candidate else ""
            own = [retraining[place] or "–" for place in several]
            lines.append([NAMES[retraining[0]], *own, candidate, *cells, mark])
    titles = [(TITLES["method"], TITLES["tasks"], TITLES["rank"])[place] for place in several]
    return Table(
        [TITLES["method"], *titles, "candidate", *(NAMES[kind] for kind in kinds), ""],
        lines,
        "RMSE of the validation users' held-out ratings, mean over numbers of shots and trials, "
        f"with the best decay of fine-tuning, --finetune-weight-decay, in brackets. {ends}".strip(),
        left=2 + len(several),
    )


RATINGS_CHOOSE = Experiment(
    CHOICE,
    "Chooses the decays of experiments.ratings on its validation users.",
    ChooseSettings,
    prepare,
    Report(lambda run: {"": table(run.rows())}),
)
main = command("python -m experiments.ratings.choose", RATINGS_CHOOSE)

if __name__ == "__main__":
    main()
