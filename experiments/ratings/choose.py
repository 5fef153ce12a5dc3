"""Chooses the decays on validation users: what stands in `experiments.ratings.settings`.

``python -m experiments.ratings.choose --data-root DIR`` retrains with every candidate of `GRID`,
fine-tunes for the validation users with every decay of `FINETUNE_GRID`, and prints the best. The
candidate of a method is that with the lowest RMSE, mean over shots and trials, after the
fine-tuning that the method is made for (standard, reptile: mean of both).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import statistics
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from experiments.lib.experiment import Experiment, Report, Work, command, each_unit
from experiments.lib.machine import choose_device, one_thread
from experiments.lib.retraining_settings import FINETUNES
from experiments.lib.runs import RunFolder
from experiments.lib.statistics import summarize
from experiments.lib.tables import NAMES, Table
from experiments.ratings.data import Ratings
from experiments.ratings.run import RANK_WARNING, check, load_ratings
from experiments.ratings.settings import DEFAULTS, SMOKE, RatingsSettings
from experiments.ratings.summary import RMSE, as_text
from experiments.ratings.trials import Trials

NAME = "ratings-choose"
# The grid of standard retraining ends at 2: at 4 it shrinks all embeddings to zero in trial 2.
GRID: Mapping[str, Mapping[str, Sequence[float]]] = {
    "lora-ml": {"weight_decay": (0.1, 0.2, 0.4), "adapter_weight_decay": (0.01, 0.03, 0.1)},
    "last-layer-ml": {"weight_decay": (0.2, 0.4, 0.8), "adapter_weight_decay": (0.2, 0.4, 0.8)},
    "standard": {"weight_decay": (0.03, 0.06, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 2.0)},
    "reptile": {"reptile_inner_lr": (1e-2, 3e-2)},
}
FINETUNE_GRID = {"lora": (2.0, 4.0, 8.0, 16.0), "last-layer": (10.0, 20.0, 40.0, 80.0)}
MADE_FOR = {"lora-ml": ("lora",), "last-layer-ml": ("last-layer",)}
COLUMNS = (
    *("experiment", "method", "candidate", "finetune", "finetune_weight_decay", "shots"),
    *("trial", "metric", "value"),
)


@dataclasses.dataclass(frozen=True)
class ChooseSettings(RatingsSettings):
    """Settings of a choice; those that the grids hold are not given."""

    command: ClassVar[str] = "choose"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in {name for grid in GRID.values() for name in grid} | {"finetune_weight_decay"}:
            field = next(f for f in dataclasses.fields(self) if f.name == name)
            if getattr(self, name) != field.default:
                flag = name.replace("_", "-")
                raise ValueError(f"argument --{flag}: the grid holds it; leave it out")

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        own = {"seeds": 1, "shots": (5, 20)}
        return {**SMOKE, "seeds": 1} if self.smoke else {**DEFAULTS, **own}


def prepare(given: ChooseSettings) -> Work:
    """Loads the ratings; every candidate of every trial is a unit of work."""
    device = choose_device(given.device)
    filled = given.resolved(device.type)
    settings = dataclasses.replace(filled, users="validation", rank=filled.rank[:1])
    ratings = load_ratings(settings)
    notes = check(settings, ratings, device)

    def run(folder: RunFolder) -> None:
        folder.add_data("ratings", ratings.sha256)
        units = {
            f"{method} {name(candidate)} {trial}": _Unit(
                folder, settings, ratings, device, method, candidate, trial
            )
            for trial in settings.trials
            for method in settings.retrain
            for candidate in candidates(method, settings.smoke)
        }
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


def candidates(method: str, smoke: bool = False) -> list[dict[str, float]]:
    """Returns the settings to try for a method; for a smoke run the first alone."""
    grid = GRID[method]
    every = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return every[:1] if smoke else every


def name(candidate: Mapping[str, float]) -> str:
    """Returns a candidate as one would type it on the command line."""
    return " ".join(f"--{k.replace('_', '-')} {value:g}" for k, value in candidate.items())


@dataclasses.dataclass(frozen=True)
class _Unit:
    """Retrains with a candidate, and fine-tunes with every decay."""

    folder: RunFolder
    settings: ChooseSettings
    ratings: Ratings
    device: torch.device
    method: str
    candidate: Mapping[str, Any]
    trial: int

    def __call__(self) -> dict[str, str]:
        s = dataclasses.replace(RatingsSettings(**_fields(self.settings)), **self.candidate)
        trials = Trials(s, self.ratings, s.tasks[0], self.trial, self.device)
        rank = s.rank[0]
        model, _ = trials.retrain(self.method, self.trial, rank=rank)
        rows = []
        for kind in s.finetune:
            for decay, shots in itertools.product(FINETUNE_GRID[kind], s.shots):
                trials.settings = dataclasses.replace(s, finetune_weight_decay=decay)
                labels: dict[str, Any] = {"method": self.method, "finetune": kind, "rank": rank}
                labels |= {"shots": shots, "trial": self.trial}
                found = trials.finetune(copy.deepcopy(model), labels)
                value = next(row["value"] for row in found if row["metric"] == RMSE)
                labels |= {"experiment": NAME, "candidate": name(self.candidate), "metric": RMSE}
                rows.append(
                    {
                        c: {**labels, "finetune_weight_decay": decay, "value": value}[c]
                        for c in COLUMNS
                    }
                )
        self.folder.add_rows(rows)
        return {}


def _fields(settings: RatingsSettings) -> dict[str, Any]:
    return {f.name: getattr(settings, f.name) for f in dataclasses.fields(RatingsSettings)}


Tried = dict[str, dict[str, dict[str, tuple[float, str]]]]


def tried(rows: Iterable[Mapping[str, str]]) -> Tried:
    """Returns by method, candidate and fine-tuning the lowest RMSE, and with which decay.

    The RMSE is the mean over shots and trials.
    """
    found: Tried = {}
    key = ("method", "candidate", "finetune", "finetune_weight_decay")
    for line in summarize(rows, key, (RMSE,)):
        of_candidate = found.setdefault(line["method"], {}).setdefault(line["candidate"], {})
        one = (line[RMSE], line["finetune_weight_decay"])
        of_candidate[line["finetune"]] = min(one, of_candidate.get(line["finetune"], one))
    return found


def best(found: Tried) -> dict[str, str]:
    """Returns the candidate chosen for each method."""
    chosen = {}
    for method, candidates_of in found.items():
        means = {
            candidate: statistics.fmean(
                value
                for kind, (value, _) in errors.items()
                if kind in MADE_FOR.get(method, FINETUNES) or len(errors) == 1
            )
            for candidate, errors in candidates_of.items()
        }
        chosen[method] = min(means, key=means.__getitem__)
    return chosen


def table(rows: Iterable[Mapping[str, str]]) -> Table:
    """Returns a line for each candidate."""
    found = tried(rows)
    chosen = best(found)
    kinds = list(next(errors for of in found.values() for errors in of.values()))
    lines = []
    for method, candidates_of in found.items():
        for candidate, errors in candidates_of.items():
            cells = [f"{errors[kind][0]:.4f} ({errors[kind][1]})" for kind in kinds]
            mark = "chosen" if chosen[method] == candidate else ""
            lines.append([NAMES[method], candidate, *cells, mark])
    return Table(
        ["retraining", "candidate", *(NAMES[kind] for kind in kinds), ""],
        lines,
        "RMSE of the validation users' held-out ratings, mean over numbers of shots and trials, "
        "with the best decay of fine-tuning, --finetune-weight-decay, in brackets.",
        left=2,
    )


RATINGS_CHOOSE = Experiment(
    NAME,
    "Chooses the decays of experiments.ratings on its validation users.",
    ChooseSettings,
    prepare,
    Report(lambda run: {"": table(run.rows())}),
)
main = command("python -m experiments.ratings.choose", RATINGS_CHOOSE)

if __name__ == "__main__":
    main()
