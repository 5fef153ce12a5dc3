"""The command: every method, fine-tuning, number of shots, draw and trial.

A run folder holds, besides what every run folder holds: ``weights/<method>-<trial>.safetensors``
with every retrained model, ``checkpoints/`` of trainings that are not finished, and the figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from experiments.lib.choices import keep_choices
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.processes import no_bar
from experiments.lib.retraining_settings import ALL
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import Labels, Trainings, open_retrained
from experiments.lib.unused import unused
from experiments.vision.data import load
from experiments.vision.rates import FLAG, Rates, chosen_rates, described
from experiments.vision.settings import PART_OF, VisionSettings
from experiments.vision.summary import COLUMNS, results_tables, summary, table
from experiments.vision.trials import Trials

NAME = "vision"


def prepare(given: VisionSettings) -> Work:
    """Loads the images; every retraining and every fine-tuning is a unit of work.

    The draws of few images are units of their own.
    """
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    dataset = load(settings.data, settings.data_root, settings.download)
    trials = Trials(settings, dataset, device)
    rates = chosen_rates(settings, NAME, dataset.sha256)
    retrainings = [
        {"method": method, "trial": trial}
        for trial in settings.trials
        for method in settings.retrain
    ]
    data = {settings.data: dataset.sha256}
    source = open_retrained(settings, NAME, PART_OF, retrainings, data)
    if device.type == "cpu":
        keep_freed_memory()

    def run(folder: RunFolder) -> None:
        folder.add_data(settings.data, dataset.sha256)
        same = {"experiment": NAME, "data": settings.data}
        trainings = Trainings(folder, trials, COLUMNS, same, source)
        if rates is not None:
            keep_choices(folder, FLAG, "finetune_lr", described(rates))
        for labels in tqdm(retrainings, desc=NAME, unit="model", disable=no_bar()):
            model = trainings.retrained(labels)
            for finetuning in finetunings(settings, labels, rates):
                trainings.finetuned(finetuning, model)

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.vision.figures import draw  # matplotlib takes a second to import

        return draw(folder)

    return Work(
        settings,
        run,
        lambda folder: table(summary(folder.rows())),
        figures,
        tag=settings.data,
        notes=[*unused(given, PART_OF, given.kinds()), *trials.notes],
    )


def finetunings(
    settings: VisionSettings, retraining: Labels, rates: Rates | None
) -> Iterator[Labels]:
    """Yields the labels of the fine-tunings after a retraining.

    Args:
        settings: resolved settings.
        retraining: the labels of the retraining.
        rates: those that another run has chosen; None runs all of this run's.
    """
    method, trial = retraining["method"], retraining["trial"]
    for kind in settings.finetune:
        for shots in settings.shots:
            chosen = settings.rates() if rates is None else (rates[method, kind, shots],)
            for draw in range(1 if shots == ALL else settings.draws):
                for rate in chosen:
                    labels = {"method": method, "finetune": kind, "shots": shots}
                    yield {**labels, "draw": draw, "finetune_lr": rate, "trial": trial}


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.vision.figures import draw_accuracy

    return [draw_accuracy(run)]


VISION = Experiment(
    NAME,
    "Retrains an MLP-Mixer on binary image tasks, then fine-tunes it on another.",
    VisionSettings,
    prepare,
    Report(lambda run: results_tables(run.rows()), _figures_of_results),
)
main = command("python -m experiments.vision", VISION)
