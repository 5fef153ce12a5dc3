"""A common start: the encoder with its head, trained once on the pooled dialogues of others.

python -m experiments.language.start --data DIR --out RUN
python -m experiments.language --data DIR --start RUN

A sentence encoder must first learn to choose one candidate of many, which small tasks cannot teach
it. A start is trained once, by standard retraining on all dialogues of a file as if they were one
task; then every method of every trial begins with it. Its run folder holds, besides what every run
folder holds, ``model/``, which is a folder of transformers with the tokenizer, and ``seen.json``,
by which a run refuses tasks whose personas or dialogues the start has seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.language.data import Corpus, data_folder, fingerprints, load_pooled
from experiments.language.progress import Clock, EpochLine
from experiments.language.settings import LanguageSettings, StartSettings
from experiments.language.summary import COLUMNS
from experiments.language.trials import Trials
from experiments.lib.cli import flag_of
from experiments.lib.errors import RunError
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.tables import Table
from experiments.lib.training import Trainings, unit_name
from metalora._files import replacing

NAME = "language-start"
MODEL, WEIGHTS, SEEN = "model", "model.safetensors", "seen.json"
SAME = ("model", "tokenizer")  # settings that a run and its start have in common
ALIKE = ("history", "max_length")  # and settings that had better be the same
SAVE = "save the model"  # the unit of work after the training


@dataclass(frozen=True)
class Start:
    """A finished common start.

    Attributes:
        folder: its run.
        settings: those it was trained with.
        seen: `experiments.language.data.fingerprints` of the dialogues it was trained on.
    """

    folder: Path
    settings: Mapping[str, Any]
    seen: frozenset[str]

    @property
    def model(self) -> Path:
        """Returns the folder of the model and its tokenizer."""
        return self.folder / MODEL

    @classmethod
    def read(cls, folder: Path, settings: LanguageSettings) -> Start:
        """Reads the run folder of a common start.

        Raises:
            RunError: it is missing, damaged, unfinished, or of another model than the settings'.
        """
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            experiment, status, given = (manifest[n] for n in ("experiment", "status", "settings"))
            differ = [n for n in SAME if given[n] != getattr(settings, n)]
            known = all(n in given for n in ALIKE)
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known or experiment != NAME:
            raise RunError(
                f"--start {folder}: holds no common start; make one with python -m "
                "experiments.language.start"
            )
        if status != "completed":
            raise RunError(
                f"--start {folder}: is {status}; finish it with python -m "
                f"experiments.language.start --resume --out {folder}"
            )
        if differ:
            name = differ[0]
            raise RunError(
                f"--start {folder}: was trained with {flag_of(name)} {given[name]}, this run has "
                f"{getattr(settings, name)}; give the same, or another start"
            )
        try:
            seen = json.loads((folder / SEEN).read_text(encoding="utf-8"))
            (folder / MODEL / WEIGHTS).stat()
        except (OSError, ValueError) as error:
            raise RunError(
                f"--start {folder}: is damaged ({error}); make a new one with python -m "
                "experiments.language.start"
            ) from None
        return cls(folder, given, frozenset(seen))

    def notes(self, settings: LanguageSettings) -> list[str]:
        """Returns lines on settings that make the start's sequences unlike those of a run."""
        given = {name: (self.settings[name], getattr(settings, name)) for name in ALIKE}
        return [
            f"note: {flag_of(name)} is {ours}, but {theirs} in the common start {self.folder}"
            for name, (theirs, ours) in given.items()
            if theirs != ours
        ]

    def check_unseen(self, corpus: Corpus) -> None:
        """Refuses tasks that the start was trained on, from either side.

        Raises:
            RunError: a task's dialogue, or its persona, is among those that the start has seen.
        """
        tasks = (*corpus.retraining, *corpus.testing)
        every = [d for task in tasks for d in (*task.train, *task.held_out)]
        found = [d for d in every if not self.seen.isdisjoint(fingerprints([d]))]
        if found:
            raise RunError(
                f"--start {self.folder}: was trained on the dialogues or personas of {len(found)} "
                f"of the {len(every)} dialogues of these tasks, first {found[0].where}; train one "
                "on a file of other personas"
            )


def prepare(given: StartSettings) -> Work:
    """Loads dialogues and a model; the training is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    with data_folder(settings.data, settings.smoke) as root:
        corpus = load_pooled(
            root,
            file=settings.file,
            held_out=settings.held_out_dialogues,
            per_turn=settings.candidates,
            seed=settings.data_seed,
        )
    trials = Trials(settings.language().resolved(device.type), corpus, device)
    if device.type == "cpu":
        keep_freed_memory()
    model = Path(settings.model).name
    labels = {"method": "standard", "trial": settings.seed}

    def run(folder: RunFolder) -> None:
        for part, sha256 in {**corpus.files[0].sha256, **trials.encoders.sha256}.items():
            folder.add_data(part, sha256)
        folder.note(**trials.facts())
        trainings = Trainings(folder, trials, COLUMNS, {"experiment": NAME, "model": model})
        each, unit = trials.work("standard"), unit_name("retrain", labels)
        trained: Any = trainings.retrained(
            labels, EpochLine(Clock(settings.epochs * each), unit, each)
        )
        if not folder.done(SAVE):
            trained.save_pretrained(folder.path(MODEL))
            trials.encoders.tokenizer.save_pretrained(folder.path(MODEL))
            used = corpus.retraining[0].train[: settings.dialogues]
            seen = fingerprints([*used, *corpus.retraining[0].held_out])
            with replacing(folder.path(SEEN)) as file:
                file.write(json.dumps(sorted(seen), indent=0).encode())
            folder.mark_done(SAVE)

    return Work(
        settings,
        run,
        lambda folder: table(folder.records(), len(trials.validation), 100 / settings.candidates),
        lambda folder: [],
        tag=model,
        notes=trials.notes(),
    )


def table(records: Sequence[Mapping[str, Any]], turns: int, chance: float) -> str:
    """Returns the accuracy after each epoch as text; ``chance`` is in percent."""
    epochs = [record for record in records if "validation" in record]
    best = max(epochs, key=lambda record: float(record["validation"]))
    lines = ["epoch      loss   accuracy in %"]
    lines += [
        f"{r['epoch'] + 1:>5} {r['loss']:>9.4f} {100 * r['validation']:>15.2f}"
        + (" (kept)" if r is best else "")
        for r in epochs
    ]
    lines.append(f"(chance) {chance:>22.2f}")
    return "\n".join([*lines, f"of {turns} held-out turns, of dialogues and personas not seen"])


def results_table(run: RunFiles) -> Table:
    """Returns the table for the documentation: the accuracy that a start begins with."""
    rows = {row["metric"]: row for row in run.rows()}
    settings, turns = run.settings(StartSettings), run.manifest["notes"]["turns"]
    measured = [rows[name]["value"] for name in ("validation_best", "validation_last")]
    kept, last = (f"{100 * float(value):.1f}" for value in measured)
    count, chance = sum(turns["validation"]), f"{100 / settings.candidates:.1f}"
    cells = [rows["validation_last"]["model"], f"{sum(turns['retraining']):,}", kept, last, chance]
    return Table(
        ["model", "turns trained on", "best epoch (kept)", "last epoch", "chance"],
        [cells],
        f"Accuracy in % of the common start on {count} held-out turns of other personas. The best "
        "epoch was chosen on these turns, so its accuracy is optimistic.",
    )


LANGUAGE_START = Experiment(
    NAME,
    "Trains an encoder with its head on the pooled dialogues of many personas, for the methods of "
    "python -m experiments.language to begin with.",
    StartSettings,
    prepare,
    Report(lambda run: {"": results_table(run)}),
)
main = command("python -m experiments.language.start", LANGUAGE_START)

if __name__ == "__main__":
    main()
