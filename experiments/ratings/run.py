"""The command: every number of retraining users, method, rank, fine-tuning, shots and trial.

A run folder holds, besides what every run folder holds:
``weights/<method>-<tasks>-<rank>-<trial>.safetensors`` with every retrained model,
``checkpoints/`` of trainings that are not finished, and the figures. Its manifest notes how many
users the ratings have, which the intervals depend on, and with ``--decays-from`` which of the
chosen weight decays lie at an end of the grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.lib.choices import keep_choices
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, one_thread
from experiments.lib.processes import no_bar
from experiments.lib.retrained import RetrainedModels
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import (
    Labels,
    Trainings,
    check_rank,
    open_retrained,
    row,
    unit_name,
)
from experiments.lib.unused import unused
from experiments.ratings.data import Ratings, load, made_up
from experiments.ratings.decays import FLAG, chosen_decays
from experiments.ratings.settings import PART_OF, USER_BIAS, RatingsSettings
from experiments.ratings.summary import COLUMNS, as_text, results_tables
from experiments.ratings.trials import Trials

NAME = "ratings"
# The last layer has one output, so that adapters of rank 1 are all it can use.
RANK_WARNING = r".*rank \d+ is above min"


def prepare(given: RatingsSettings) -> Work:
    """Loads the ratings; retrainings, fine-tunings and baselines are units of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    ratings = load_ratings(settings)
    notes = [*unused(given, PART_OF, given.kinds()), *check(settings, ratings, device)]
    planned = [
        training
        for trial in settings.trials
        for tasks in settings.tasks
        for training in trainings(settings, tasks, trial)
    ]
    decays = chosen_decays(settings, ratings.sha256, planned)
    data = {"ratings": ratings.sha256}
    source = open_retrained(settings, NAME, PART_OF, [labels for labels, _ in planned], data)

    def run(folder: RunFolder) -> None:
        folder.add_data("ratings", ratings.sha256)
        keep_choices(folder, FLAG, "decay", decays.described())
        folder.note(users=ratings.num_users)
        if decays.ends:
            folder.note(at_ends=decays.ends)
        for trial in tqdm(settings.trials, desc=NAME, unit="trial", disable=no_bar()):
            for tasks in settings.tasks:
                trials = Trials(settings, ratings, tasks, trial, device, decays)
                run_trial(folder, trials, trial, source)

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.ratings.figures import draw  # matplotlib takes a second to import

        return draw(folder)

    def table(folder: RunFolder) -> str:
        return as_text(results_tables(folder).values())

    return Work(settings, run, table, figures, tag=settings.users, notes=notes)


def load_ratings(settings: RatingsSettings) -> Ratings:
    """Loads the ratings; for a smoke run without data it makes some up.

    Raises:
        DataError: the data are missing or damaged.
        ValueError: no data were given.
    """
    if settings.data_root is not None:
        return load(settings.data_root)
    if not settings.smoke:
        raise ValueError(
            "argument --data-root: give MovieLens-100K (ml-100k.inter, u.data, recbole's wheel, or "
            "the folder of one); --smoke runs without"
        )
    return made_up()


def check(settings: RatingsSettings, ratings: Ratings, device: torch.device) -> list[str]:
    """Refuses settings that the ratings are too few for, before anything is computed.

    Returns:
        lines on the data and on users who are left out.

    Raises:
        RunError: there are too few users or ratings, or a rank is too large for the model.
    """
    lines = [] if settings.data_root is None else ratings.notes()
    most, every = max(settings.tasks), settings.list_users
    for trial in settings.trials:
        trials = Trials(settings, ratings, most, trial, device)
        if trial == settings.first_seed:
            check_rank(trials.new_model(trial), max(settings.rank))
        for shots in settings.shots:
            trials.unseen.few(shots)
            trials.choosing.few(shots)
            left_out = [ratings.user_names[user] for user in trials.unseen.too_few(shots)]
            if not left_out or not (every or trial == settings.first_seed):
                continue
            listed = ": " + " ".join(left_out) if every else "; --list-users lists them"
            lines.append(
                f"note: trial {trial}, {shots} shots: {len(left_out)} of "
                f"{len(trials.unseen.users)} users are left out, who have fewer than "
                f"{shots + settings.held_out} ratings{listed}"
            )
    return lines


def trainings(
    settings: RatingsSettings, tasks: int, trial: int
) -> Iterator[tuple[Labels, list[Labels]]]:
    """Yields the labels of a trial's retrainings, and of the fine-tunings after each."""
    for method in settings.retrain:
        for rank in settings.ranks(method):
            # Labels of other fine-tunings do not tell several ranks of a retraining apart.
            one = rank is None or len(settings.rank) == 1
            after: list[Labels] = []
            for kind in (*settings.finetune, USER_BIAS) if one else ("lora",):
                for r in settings.ranks(kind) if rank is None or kind != "lora" else (rank,):
                    same: Labels = {"method": method, "finetune": kind, "tasks": tasks, "rank": r}
                    after += [{**same, "shots": shots, "trial": trial} for shots in settings.shots]
            yield {"method": method, "tasks": tasks, "rank": rank, "trial": trial}, after


def run_trial(
    folder: RunFolder, trials: Trials, trial: int, source: RetrainedModels | None
) -> None:
    """Does what the folder does not hold yet of a trial with a number of retraining users."""
    settings, constant = trials.settings, {"experiment": NAME}
    units = Trainings(folder, trials, COLUMNS, constant, source)
    with one_thread(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=RANK_WARNING)
        for name in settings.baselines:
            for shots in settings.shots:
                own = {"method": name, "tasks": trials.tasks, "shots": shots, "trial": trial}
                unit = unit_name("baseline", own)
                if not folder.done(unit):
                    same, found = {**constant, **own}, trials.baseline(name, shots, trial)
                    folder.add_rows([row(COLUMNS, {**same, **values}) for values in found])
                    folder.mark_done(unit)
        for labels, after in trainings(settings, trials.tasks, trial):
            model = units.retrained(labels)
            for finetuning in after:
                units.finetuned(finetuning, model)


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.ratings.figures import draw

    return draw(run)


RATINGS = Experiment(
    NAME,
    "Retrains a network on the film ratings of some users, then fine-tunes it for others on few of "
    "theirs.",
    RatingsSettings,
    prepare,
    Report(results_tables, _figures_of_results),
)
main = command("python -m experiments.ratings", RATINGS)
