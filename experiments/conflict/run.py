"""The command: every trial, setting of the dial, method, fine-tuning and number of shots."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from experiments.conflict.settings import IMAGES, OF_METHODS, PART_OF, ConflictSettings
from experiments.conflict.summary import COLUMNS, results_tables, table
from experiments.conflict.trials import Trials
from experiments.lib.choices import keep_choices
from experiments.lib.cli import flag_of
from experiments.lib.experiment import Experiment, Report, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.processes import no_bar
from experiments.lib.runs import RunFiles, RunFolder
from experiments.lib.training import Trainings
from experiments.lib.unused import unused
from experiments.vision.data import load

NAME = "conflict"
DIALS = ("pairs", "inputs", "flipped")


def prepare(given: ConflictSettings) -> Work:
    """Loads the images; every retraining and every fine-tuning is a unit of work."""
    device = choose_device(given.device)
    settings = given.resolved(device.type)
    dataset = load(IMAGES[settings.data], settings.data_root, settings.download)
    points = [
        (point, own, trial)
        for trial in settings.trials
        for point in settings.points()
        for own in settings.candidates()
    ]
    for panel in settings.panels():  # refuses settings before anything is written
        checked = Trials(settings, dataset, (*panel, 0.0), settings.first_seed, device)
    if device.type == "cpu":
        keep_freed_memory()

    def run(folder: RunFolder) -> None:
        folder.add_data(settings.data, dataset.sha256)
        for name in () if settings.tune else OF_METHODS[settings.data]:
            of_methods = {method: settings.of(method)[name] for method in settings.retrain}
            keep_choices(folder, flag_of(name), name, of_methods)
        same = {"experiment": NAME, "data": settings.data}
        for point, own, trial in tqdm(points, desc=NAME, unit="point", disable=no_bar()):
            trials = Trials(own, dataset, point, trial, device)
            trainings = Trainings(folder, trials, COLUMNS, same)
            for method in settings.retrain:
                labels = {**dict(zip(DIALS, point, strict=True)), "method": method}
                if settings.tune:
                    given = own.of(method)
                    labels |= {"batch_size": given["batch_size"], "retrain_lr": given["lr"]}
                model = trainings.retrained({**labels, "trial": trial})
                for kind in settings.finetune:
                    for shots in settings.shots:
                        few = {"finetune": kind, "shots": shots, "trial": trial}
                        trainings.finetuned({**labels, **few}, model)

    def figures(folder: RunFolder) -> list[Path]:
        from experiments.conflict.figures import draw  # matplotlib takes a second to import

        return draw(folder)

    return Work(
        settings,
        run,
        lambda folder: table(folder.rows()),
        figures,
        tag=settings.data,
        notes=[*unused(given, PART_OF, given.kinds()), *checked.notes],
    )


def _figures_of_results(run: RunFiles) -> list[Path]:
    from experiments.conflict.figures import draw

    return draw(run)


CONFLICT = Experiment(
    NAME,
    "Retrains a Mixer on pairs of image classes, then fine-tunes it on pairs with a new class.",
    ConflictSettings,
    prepare,
    Report(lambda run: results_tables(run.rows()), _figures_of_results),
)
main = command("python -m experiments.conflict", CONFLICT)
