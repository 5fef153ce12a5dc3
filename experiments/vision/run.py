"""The command: every method, fine-tuning, number of shots and trial.

A run folder holds, besides what every run folder holds: ``weights/<method>-<trial>.safetensors``
with every retrained model, and the figures.
"""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import Trainings
from experiments.lib.unused import unused
from experiments.vision.data import load
from experiments.vision.settings import PART_OF, VisionSettings
from experiments.vision.summary import COLUMNS, results_tables, summary, table
from experiments.vision.trials import Trials

NAME = "vision"


def prepare(given: VisionSettings) -> Work:
    """Loads the images; every retraining and every fine-tuning is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    dataset = load(settings.data, settings.data_root, settings.download)
    trials = Trials(settings, dataset, device)
    if device.type == "cpu":
        keep_freed_memory()

    def run(folder: RunFolder) -> None:
        folder.add_data(settings.data, dataset.sha256)
        trainings = Trainings(folder, trials, COLUMNS, {"experiment": NAME, "data": settings.data})
        work = [(trial, method) for trial in settings.trials for method in settings.retrain]
        for trial, method in tqdm(work, desc=NAME, unit="model", disable=None):
            model = trainings.retrained({"method": method, "trial": trial})
            for kind in settings.finetune:
                for shots in settings.shots:
                    labels = {"method": method, "finetune": kind, "shots": shots, "trial": trial}
                    trainings.finetuned(labels, model)

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
