"""The weight decays of a run: those of the settings, or those that another run has chosen.

A run of `experiments.ratings.choose` tries every candidate of `GRID` for a method. The chosen one
has the lowest RMSE of the validation users, mean over shots and trials, after the fine-tuning that
the method is made for (standard, reptile: mean of both). A fine-tuning's decay is the best with it.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.choices import finished_run
from experiments.lib.errors import RunError
from experiments.lib.manifest import plain
from experiments.lib.retraining_settings import FINETUNES
from experiments.lib.runs import read_rows
from experiments.lib.statistics import summarize, worth_of
from experiments.lib.training import Labels
from experiments.lib.units import RESULTS
from experiments.ratings.settings import CHOSEN, FINETUNED, USER_BIAS, RatingsSettings
from experiments.ratings.summary import RMSE

FLAG = "--decays-from"
CHOICE = "ratings-choose"
# The highest weight decay of standard retraining, 4, is best in some trials, but shrinks all
# embeddings to zero in trial 2. Choose on several trials (--seeds), so that this counts.
GRID: Mapping[str, Mapping[str, Sequence[float]]] = {
    "lora-ml": {
        "weight_decay": (0.025, 0.05, 0.1, 0.2, 0.4),
        "adapter_weight_decay": (0.001, 0.003, 0.01, 0.03, 0.1, 0.3),
    },
    "last-layer-ml": {
        "weight_decay": (0.2, 0.4, 0.8, 1.6, 3.2),
        "adapter_weight_decay": (0.05, 0.1, 0.2, 0.4, 0.8),
    },
    "standard": {"weight_decay": (0.03, 0.06, 0.1, 0.2, 0.4, 0.6, 0.8, 1.2, 2.0, 3.0, 4.0)},
    "reptile": {
        "reptile_inner_lr": (1e-2, 3e-2, 0.1, 0.3),
        "reptile_lr": (0.01, 0.03, 0.1, 0.3),
    },
}
FINETUNE_GRID = {"lora": (1.0, 2.0, 4.0, 8.0, 16.0), "last-layer": (5.0, 10.0, 20.0, 40.0, 80.0)}
MADE_FOR = {"lora-ml": ("lora",), "last-layer-ml": ("last-layer",)}
# Settings that a choice and the run that uses it may have apart.
FREE = ("users", "baselines", "first_seed", "decays_from")

Retraining = tuple[str, str, str]  # method, number of retraining users and rank
Finetuning = tuple[str, str]  # kind and rank
# By candidate and fine-tuning, the lowest RMSE and with which decay.
Tried = dict[Retraining, dict[str, dict[Finetuning, tuple[float, str]]]]


@dataclasses.dataclass(frozen=True)
class Decays:
    """What is chosen for each training; `CHOSEN` and `FINETUNED` where nothing is.

    Attributes:
        retrainings, finetunings: the choices.
        ends: what `at_ends` returns for them; {} where no run has chosen them.
    """

    retrainings: Mapping[Retraining, Mapping[str, float]]
    finetunings: Mapping[tuple[Retraining, Finetuning], float]
    ends: Mapping[str, bool] = dataclasses.field(default_factory=dict)

    def of_retraining(self, method: str, tasks: int, rank: int | None) -> dict[str, float]:
        """Returns the settings chosen for a retraining."""
        return {**CHOSEN[method], **self.retrainings.get(_retraining(method, tasks, rank), {})}

    def of_finetuning(self, labels: Labels, tasks: int, retrained_rank: int | None) -> float:
        """Returns the decay chosen for a fine-tuning; the last two are of the retraining."""
        method, kind = labels["method"], labels["finetune"]
        key = _retraining(method, tasks, retrained_rank), (kind, _text(labels["rank"]))
        return self.finetunings.get(key, FINETUNED[method, kind])

    def described(self) -> dict[str, Any]:
        """Returns the choices for a manifest, by a text that says what for."""
        of = {_named(key): dict(chosen) for key, chosen in self.retrainings.items()}
        return {**of, **{_named(*key): decay for key, decay in self.finetunings.items()}}


DEFAULT = Decays({}, {})


def chosen_decays(
    settings: RatingsSettings,
    sha256: str,
    trainings: Iterable[tuple[Labels, Sequence[Labels]]],
) -> Decays:
    """Returns what is chosen for each training: by the run in ``settings.decays_from``, if any.

    Args:
        settings: resolved settings.
        sha256: checksum of the ratings.
        trainings: labels of the retrainings, and of the fine-tunings after each.

    Raises:
        RunError: the run is not finished, has other settings or ratings, or lacks a training.
    """
    folder, rows = settings.decays_from, []
    if folder is not None:
        _check_same(settings, folder, finished_run(folder, FLAG, CHOICE, {"ratings": sha256}))
        rows = read_rows(folder / RESULTS)
    found = best_decays(rows)
    retrainings, finetunings = {}, {}
    for labels, after in trainings:
        method, tasks, rank = labels["method"], labels["tasks"], labels["rank"]
        key = _retraining(method, tasks, rank)
        retrainings[key] = DEFAULT.of_retraining(method, tasks, rank)
        if folder is not None:
            if key not in found.retrainings:
                raise RunError(
                    f"{FLAG}: the run in {folder} has not tried {_named(key)}; resume it or "
                    "choose anew with that"
                )
            retrainings[key] |= found.retrainings[key]
        for one in after:
            if one["finetune"] == USER_BIAS:
                continue
            kind = one["finetune"], _text(one["rank"])
            finetunings[key, kind] = DEFAULT.of_finetuning(one, tasks, rank)
            if folder is not None:
                if (key, kind) not in found.finetunings:
                    raise RunError(
                        f"{FLAG}: the run in {folder} has not tried {' '.join(kind).rstrip()} "
                        f"after {_named(key)}; choose anew with that"
                    )
                finetunings[key, kind] = found.finetunings[key, kind]
    chosen = Decays(retrainings, finetunings)
    return dataclasses.replace(chosen, ends=at_ends(chosen, rows))


def _check_same(settings: RatingsSettings, folder: Path, manifest: Mapping[str, Any]) -> None:
    """Refuses a choice that was made with other settings."""
    for field in dataclasses.fields(settings):
        if any(field.metadata.get(key) for key in ("run_only", "extends")) or field.name in FREE:
            continue
        was, wanted = manifest["settings"].get(field.name), plain(getattr(settings, field.name))
        if was != wanted:
            raise RunError(
                f"{FLAG}: the run in {folder} has {field.name} {was!r}, not {wanted!r}; "
                "choose anew with the settings of this run"
            )


def candidates(method: str, rank: int | None, smoke: bool = False) -> Iterator[dict[str, float]]:
    """Yields the settings to try for a method; for a smoke run the first alone."""
    grid = GRID["standard" if method == "lora-ml" and rank == 0 else method]
    every = (dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values()))
    return itertools.islice(every, 1 if smoke else None)


def name(candidate: Mapping[str, float]) -> str:
    """Returns a candidate as one would type it on the command line."""
    return " ".join(f"--{k.replace('_', '-')} {value:g}" for k, value in candidate.items())


def _values(candidate: str) -> dict[str, float]:
    """Returns what `name` was made from."""
    words = candidate.split()
    return {
        flag.removeprefix("--").replace("-", "_"): float(value)
        for flag, value in zip(words[::2], words[1::2], strict=True)
    }


def tried(rows: Iterable[Mapping[str, str]]) -> Tried:
    """Returns what each candidate of each retraining has reached.

    The RMSE is the mean over shots and trials.
    """
    found: Tried = {}
    retraining, finetuning = ("method", "tasks", "rank"), ("finetune", "finetune_rank")
    key = (*retraining, "candidate", *finetuning, "finetune_weight_decay")
    for line in summarize(rows, key, (RMSE,)):
        of = found.setdefault(tuple(line[k] for k in retraining), {})
        of_candidate = of.setdefault(line["candidate"], {})
        kind = tuple(line[k] for k in finetuning)
        one = (line[RMSE], line["finetune_weight_decay"])
        known = of_candidate.get(kind, one)
        of_candidate[kind] = max(
            known, one, key=lambda found: worth_of(found[0], lower_is_better=True)
        )
    return found


def best(found: Tried) -> dict[Retraining, str]:
    """Returns the candidate chosen for each retraining."""
    chosen = {}
    for retraining, candidates_of in found.items():
        kinds = {kind for errors in candidates_of.values() for kind, _ in errors}
        counted = kinds & {*MADE_FOR.get(retraining[0], FINETUNES)} or kinds
        means = {
            candidate: statistics.fmean(
                v for (kind, _), (v, _) in errors.items() if kind in counted
            )
            for candidate, errors in candidates_of.items()
        }
        chosen[retraining] = max(
            means, key=lambda candidate: worth_of(means[candidate], lower_is_better=True)
        )
    return chosen


def best_decays(rows: Sequence[Mapping[str, str]]) -> Decays:
    """Returns all that a run has chosen, from its rows."""
    found = tried(rows)
    chosen = best(found)
    decays = Decays(
        {key: _values(candidate) for key, candidate in chosen.items()},
        {
            (key, kind): float(decay)
            for key, candidate in chosen.items()
            for kind, (_, decay) in found[key][candidate].items()
        },
    )
    return dataclasses.replace(decays, ends=at_ends(decays, rows))


def at_ends(decays: Decays, rows: Iterable[Mapping[str, str]]) -> dict[str, bool]:
    """Returns for each choice whether it is the lowest or the highest value that was tried.

    There a wider grid may hold a better one. What had a single value to choose from is left out.

    Args:
        decays: the choices.
        rows: of the run that has made them, with all that it tried.
    """
    grids: dict[tuple[str, str], set[float]] = {}  # by the names of a training and a setting
    for row in rows:
        key = row["method"], row["tasks"], row["rank"]
        for setting, value in _values(row["candidate"]).items():
            grids.setdefault((_named(key), setting), set()).add(value)
        own = _named(key, (row["finetune"], row["finetune_rank"])), "finetune_weight_decay"
        grids.setdefault(own, set()).add(float(row["finetune_weight_decay"]))
    chosen = {
        (_named(key), setting): value
        for key, of in decays.retrainings.items()
        for setting, value in of.items()
    }
    for training, value in decays.finetunings.items():
        chosen[_named(*training), "finetune_weight_decay"] = value
    return {
        ": ".join(what): value in (min(grids[what]), max(grids[what]))
        for what, value in chosen.items()
        if len(grids.get(what, ())) > 1
    }


def _text(rank: int | None) -> str:
    return "" if rank is None else str(rank)


def _retraining(method: str, tasks: int, rank: int | None) -> Retraining:
    return method, str(tasks), _text(rank)


def _named(retraining: Retraining, finetuning: Finetuning | None = None) -> str:
    method, tasks, rank = retraining
    name = f"{method} with {tasks} users" + (f" and rank {rank}" if rank else "")
    if finetuning is None:
        return name
    kind, rank = finetuning
    return f"{name}: fine-tuning, {kind}" + (f", rank {rank}" if rank else "")
