"""The command ``python -m experiments.language``."""

from __future__ import annotations

import tempfile
from pathlib import Path

from experiments.language import figures, summary
from experiments.language.data import Corpus, load, write_made_up
from experiments.language.settings import PART_OF, Settings
from experiments.language.trials import Trials
from experiments.lib.experiment import Experiment, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.unused import unused


def prepare(settings: Settings) -> Work:
    """Checks the settings, loads the dialogues and a model, and makes the token sequences."""
    device = choose_device(settings.device)
    notes = unused(settings, PART_OF, settings.kinds())
    settings = settings.resolved(device.type)
    trials = Trials(settings, load_corpus(settings), device)
    if device.type == "cpu":
        keep_freed_memory()
    chance = 100 / settings.candidates
    return Work(
        settings,
        trials.run,
        table=lambda folder: summary.tables(folder.rows(), chance),
        figures=lambda folder: figures.draw(folder, chance),
        tag=Path(settings.model).name,
        notes=[*notes, *trials.notes()],
    )


def load_corpus(settings: Settings) -> Corpus:
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


EXPERIMENT = Experiment(
    "language",
    "Retrains a language model on the dialogues of some personas, then fine-tunes it on those of "
    "others, to choose the next utterance among 20.",
    Settings,
    prepare,
)
main = command("python -m experiments.language", EXPERIMENT)
