"""The command: every trial, method, fine-tuning and amount of text.

A run folder holds, besides what every run folder holds: ``weights/<method>-<trial>.safetensors``
with every retrained model, ``checkpoints/`` of trainings that are not finished, ``samples.json``
with text that the models wrote, and the figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from experiments.lib.errors import RunError
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.processes import no_bar, rank
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.tables import Table
from experiments.lib.training import Labels, Trainings
from experiments.lib.unused import unused
from experiments.text.data import KB, MADE_UP, Corpus, data_folder, load
from experiments.text.samples import PHASE, WriteSamples
from experiments.text.settings import PART_OF, TextSettings
from experiments.text.summary import COLUMNS, SAMPLES, results_tables, table
from experiments.text.trials import Trials

NAME = "text"


def prepare(given: TextSettings) -> Work:
    """Reads the text and makes the model; every retraining and adaptation is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    corpus = read(settings)
    trials = Trials(settings, corpus, device)
    if device.type == "cpu":
        keep_freed_memory()
    model = Path(settings.model).name

    def run(folder: RunFolder) -> None:
        for part, sha256 in {"text": corpus.sha256, **trials.decoders.sha256}.items():
            folder.add_data(part, sha256)
        folder.note(**trials.facts())
        trainings = Trainings(folder, trials, COLUMNS, {"experiment": NAME, "model": model})
        plan = [(trial, method) for trial in settings.trials for method in settings.retrain]
        for trial, method in tqdm(plan, desc=NAME, unit="model", disable=no_bar()):
            if method == "none":
                retrained = trials.new_model(trial)
            else:
                retrained = trainings.retrained({"method": method, "trial": trial})
            for kind in settings.finetune:
                for amount in settings.amounts:
                    labels = {"method": method, "finetune": kind, "amount": amount, "trial": trial}
                    trainings.finetuned(labels, retrained, *_watched(folder, trials, labels))
            if rank() == 0:  # the only one that does not read what another is writing
                folder.write_json(SAMPLES, _samples(folder))

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.text.figures import draw  # matplotlib takes a second to import

        return draw(folder)

    return Work(
        settings,
        run,
        lambda folder: table(folder.rows()),
        figures,
        tag=model,
        notes=[*unused(given, PART_OF, given.kinds()), *trials.notes()],
    )


def read(settings: TextSettings) -> Corpus:
    """Reads the text of all tasks; a smoke run without data makes some up.

    Raises:
        RunError: tasks are missing, or have too little text.
        ValueError: no data were given.
    """
    validation, test = settings.validation_tasks, settings.test_tasks
    with data_folder(settings.data, settings.smoke) as root:
        if settings.data is None:
            validation, test = validation or MADE_UP[3:4], test or MADE_UP[4:]
        if settings.finetune and not (validation and (test or settings.tune)):
            raise RunError(
                "--validation-tasks and --test-tasks: name the unseen tasks, the first to choose "
                "rates by, the second to report on; or --finetune none"
            )
        return load(
            root,
            tasks=settings.tasks,
            validation_tasks=validation,
            test_tasks=() if settings.tune else test,
            train=KB * settings.train_kb,
            few=round(KB * max(settings.amounts)),
            held_out=KB * settings.held_out_kb,
            seed=settings.data_seed,
        )


def _watched(folder: RunFolder, trials: Trials, labels: Labels) -> list[WriteSamples]:
    """Returns what has text written: of LoRA, in the first trial, with the most text."""
    s = trials.settings
    wanted = s.first_seed, max(s.amounts), "lora"
    if s.tune or (labels["trial"], labels["amount"], labels["finetune"]) != wanted:
        return []
    tokenizer = trials.decoders.tokenizer
    return [WriteSamples(folder, labels, trials.unseen["test"], tokenizer, s.written_tokens)]


def _samples(folder: RunFolder) -> list[dict[str, Any]]:
    return [record for record in folder.records() if record.get("phase") == PHASE]


def _tables_of_results(run: RunFiles) -> Mapping[str, Table]:
    samples: Sequence[Mapping[str, Any]] = json.loads(run.path(SAMPLES).read_text("utf-8"))
    return results_tables(run.rows(), samples)


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.text.figures import draw

    return draw(run)


TEXT = Experiment(
    NAME,
    "Retrains a causal language model on the text of some tasks, then adapts it to a little text "
    "of others.",
    TextSettings,
    prepare,
    Report(_tables_of_results, _figures_of_results, files=(SAMPLES,)),
)
main = command("python -m experiments.text", TEXT)
