"""The command: every method, rank, fine-tuning and trial.

A run folder holds, besides what every run folder holds:
``weights/<method>-<rank>-<trial>.safetensors`` with every retrained model, ``checkpoints/`` of
trainings that are not finished, and the figures.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from experiments.language.data import Corpus, data_folder, load
from experiments.language.progress import Clock, EpochLine
from experiments.language.settings import PART_OF, TINY, LanguageSettings
from experiments.language.start import Start
from experiments.language.summary import COLUMNS, results_tables, tables
from experiments.language.trials import Trials
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory, one_thread
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import Labels, Trainings, open_retrained, unit_name
from experiments.lib.unused import unused

NAME = "language"


def prepare(given: LanguageSettings) -> Work:
    """Loads dialogues and a model; every retraining and every fine-tuning is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    start = None if settings.start is None else Start.read(settings.start, settings)
    corpus = load_corpus(settings)
    if start is not None:
        start.check_unseen(corpus)
    trials = Trials(settings, corpus, device, start=None if start is None else start.model)
    if device.type == "cpu":
        keep_freed_memory()
    data = {part: sha256 for file in corpus.files for part, sha256 in file.sha256.items()}
    data |= trials.encoders.sha256
    planned = [labels for phase, labels in plan(settings) if phase == "retrain"]
    retrainings = [labels for labels in planned if labels["method"] != "none"]
    source = open_retrained(settings, NAME, PART_OF, retrainings, data)
    model, chance = Path(settings.model).name, 100 / settings.candidates

    def run(folder: RunFolder) -> None:
        for part, sha256 in data.items():
            folder.add_data(part, sha256)
        folder.note(**trials.facts())
        same = {"experiment": NAME, "model": model}
        trainings = Trainings(folder, trials, COLUMNS, same, source)
        with one_thread() if settings.model == TINY else contextlib.nullcontext():
            _run(trainings, trials)

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.language.figures import draw  # matplotlib takes a second to import

        return draw(folder, chance)

    return Work(
        settings,
        run,
        lambda folder: tables(folder.rows(), chance),
        figures,
        tag=model,
        notes=[
            *unused(given, PART_OF, given.kinds()),
            *trials.notes(),
            *(start.notes(settings) if start else ()),
            *costs(trials),
        ],
    )


def load_corpus(settings: LanguageSettings) -> Corpus:
    """Loads the dialogues; for a smoke run without data it makes some up.

    Raises:
        RunError: the data are missing, damaged or too few.
        ValueError: no data were given.
    """
    with data_folder(settings.data, settings.smoke) as root:
        return load(
            root,
            retrain_file=settings.retrain_file,
            test_file=settings.test_file,
            tasks=settings.tasks,
            test_tasks=settings.test_tasks,
            first_test_task=settings.first_test_task,
            held_out=settings.validation_dialogues,
            test_held_out=settings.held_out_dialogues,
            per_turn=settings.candidates,
            seed=settings.data_seed,
        )


def plan(settings: LanguageSettings) -> Iterator[tuple[str, Labels]]:
    """Yields the phase and labels of every training: a retraining, then its fine-tunings."""
    for trial in settings.trials:
        for method in settings.retrain:
            for rank in settings.ranks(method):
                yield "retrain", {"method": method, "rank": rank, "trial": trial}
                for kind in settings.finetunes(method):
                    for r in settings.ranks(kind) if rank is None else (rank,):
                        labels = {"method": method, "finetune": kind, "rank": r, "trial": trial}
                        yield "finetune", labels


def costs(trials: Trials) -> list[str]:
    """Returns lines that say how many tokens the trainings take."""
    s = trials.settings
    phases = Counter(
        phase
        for phase, labels in plan(s)
        if phase == "finetune" or (labels["method"] != "none" and not s.retrained)
    )
    parts = {
        "retrain": ("retrainings", s.epochs, trials.retraining, trials.validation),
        "finetune": ("fine-tunings", s.finetune_epochs, trials.test, trials.test_held_out),
    }
    return [
        f"plan: {phases[phase]} {name} of {epochs} epochs, each of {train.tokens:,} tokens to "
        f"train on and {held_out.tokens:,} held out"
        for phase, (name, epochs, train, held_out) in parts.items()
        if phases[phase]
    ]


def _run(trainings: Trainings, trials: Trials) -> None:
    """Does what the folder does not hold yet, with a line on stderr after every epoch."""
    work = [
        (phase, labels, unit_name(phase, labels), trials.work(kind))
        for phase, labels in plan(trials.settings)
        for kind in [labels.get("finetune", labels["method"])]
    ]
    epochs = {"retrain": trials.settings.epochs, "finetune": trials.settings.finetune_epochs}
    left = [
        epochs[phase] * each
        for phase, _, unit, each in work
        if not trainings.folder.done(unit) and (phase == "finetune" or trainings.source is None)
    ]
    clock = Clock(sum(left))
    for phase, labels, unit, each in work:
        line = EpochLine(clock, unit, each)
        if labels["method"] == "none" and phase == "retrain":
            model = trials.new_model(labels["trial"])
        elif phase == "retrain":
            model = trainings.retrained(labels, line)
        else:
            trainings.finetuned(labels, model, line)


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.language.figures import draw

    return draw(run, 100 / run.manifest["settings"]["candidates"])


LANGUAGE = Experiment(
    NAME,
    "Retrains a language model on the dialogues of some personas, then fine-tunes it on those of "
    "others, to choose the next utterance among 20.",
    LanguageSettings,
    prepare,
    Report(lambda run: results_tables(run.rows()), _figures_of_results),
)
main = command("python -m experiments.language", LANGUAGE)
