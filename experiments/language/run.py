"""The command: every method, rank, fine-tuning and trial.

A run folder holds, besides what every run folder holds:
``weights/<method>-<rank>-<trial>.safetensors`` with every retrained model, and the figures.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from experiments.language.data import Corpus, load, write_made_up
from experiments.language.progress import Clock, EpochLine
from experiments.language.settings import PART_OF, TINY, LanguageSettings
from experiments.language.summary import COLUMNS, tables
from experiments.language.trials import Trials
from experiments.lib.experiment import Experiment, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory, one_thread
from experiments.lib.runs import RunFolder
from experiments.lib.training import Labels, Trainings, unit_name
from experiments.lib.unused import unused

NAME = "language"


def prepare(given: LanguageSettings) -> Work:
    """Loads dialogues and a model; every retraining and every fine-tuning is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    corpus = load_corpus(settings)
    trials = Trials(settings, corpus, device)
    if device.type == "cpu":
        keep_freed_memory()
    model, chance = Path(settings.model).name, 100 / settings.candidates

    def run(folder: RunFolder) -> None:
        for file in corpus.files:
            for part, sha256 in file.sha256.items():
                folder.add_data(part, sha256)
        folder.note(**trials.facts())
        trainings = Trainings(folder, trials, COLUMNS, {"experiment": NAME, "model": model})
        with one_thread() if settings.model == TINY else contextlib.nullcontext():
            _run(trainings, trials, branches(settings))

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.language.figures import draw  # matplotlib takes a second to import

        return draw(folder, chance)

    return Work(
        settings,
        run,
        lambda folder: tables(folder.rows(), chance),
        figures,
        tag=model,
        notes=[*unused(given, PART_OF, given.kinds()), *trials.notes()],
    )


def load_corpus(settings: LanguageSettings) -> Corpus:
    """The dialogues, or for a smoke run without data made-up ones.

    Raises:
        RunError: the data are missing, damaged or too few.
        ValueError: no data were given.
    """
    with tempfile.TemporaryDirectory() as made_up:
        root = settings.data
        if root is None:
            if not settings.smoke:
                raise ValueError(
                    "argument --data: give the folder of the ConvAI2 dialogues; "
                    "--smoke runs without"
                )
            root = Path(made_up)
            write_made_up(root)
        return load(
            root,
            retrain_file=settings.retrain_file,
            test_file=settings.test_file,
            tasks=settings.tasks,
            test_tasks=settings.test_tasks,
            held_out=settings.validation_dialogues,
            test_held_out=settings.held_out_dialogues,
            strict=settings.strict,
            per_turn=settings.candidates,
            seed=settings.data_seed,
            turns=settings.turns,
        )


Branch = tuple[Labels, list[Labels]]  # a retraining, and the fine-tunings that go on from it


def branches(settings: LanguageSettings) -> list[Branch]:
    """The labels of all trainings of a run."""
    found: list[Branch] = []
    for trial in settings.trials:
        for method in settings.retrain:
            for rank in settings.ranks(method):
                finetunings: list[Labels] = [
                    {"method": method, "finetune": kind, "rank": r, "trial": trial}
                    for kind in settings.finetunes(method)
                    for r in (settings.ranks(kind) if rank is None else (rank,))
                ]
                found.append(({"method": method, "rank": rank, "trial": trial}, finetunings))
    return found


def _run(trainings: Trainings, trials: Trials, work: Sequence[Branch]) -> None:
    """Does what the folder does not hold yet, with a line on stderr after every epoch."""
    settings = trials.settings

    def left(phase: str, labels: Labels, kind: str, epochs: int) -> float:
        return 0 if trainings.folder.done(unit_name(phase, labels)) else epochs * trials.work(kind)

    clock = Clock(
        sum(
            left("retrain", labels, labels["method"], settings.epochs)
            + sum(left("finetune", f, f["finetune"], settings.finetune_epochs) for f in finetunings)
            for labels, finetunings in work
        )
    )

    def line(phase: str, labels: Labels, kind: str) -> EpochLine:
        return EpochLine(clock, unit_name(phase, labels), trials.work(kind))

    for labels, finetunings in work:
        method = labels["method"]
        if method == "none":
            model = trials.new_model(labels["trial"])
        else:
            model = trainings.retrained(labels, line("retrain", labels, method))
        for of_one in finetunings:
            trainings.finetuned(of_one, model, line("finetune", of_one, of_one["finetune"]))


LANGUAGE = Experiment(
    NAME,
    "Retrains a language model on the dialogues of some personas, then fine-tunes it on those of "
    "others, to choose the next utterance among 20.",
    LanguageSettings,
    prepare,
)
main = command("python -m experiments.language", LANGUAGE)
