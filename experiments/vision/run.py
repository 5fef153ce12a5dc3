"""The command ``python -m experiments.vision``."""

from __future__ import annotations

from experiments.lib.experiment import Experiment, Work, command
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.unused import unused
from experiments.vision import figures, summary
from experiments.vision.data import load
from experiments.vision.settings import PART_OF, Settings
from experiments.vision.trials import Trials


def prepare(settings: Settings) -> Work:
    """Checks the settings, loads the images, and builds what the trials need."""
    device = choose_device(settings.device)
    notes = unused(settings, PART_OF, settings.kinds())
    settings = settings.resolved(device.type)
    dataset = load(settings.data, settings.data_root, settings.download)
    trials = Trials(settings, dataset, device)
    if device.type == "cpu":
        keep_freed_memory()
    return Work(
        settings,
        trials.run,
        table=lambda folder: summary.table(summary.summary(folder.rows())),
        figures=figures.draw,
        tag=settings.data,
        notes=[*notes, *trials.notes],
    )


EXPERIMENT = Experiment(
    "vision",
    "Retrains an MLP-Mixer on binary image tasks, then fine-tunes it on another.",
    Settings,
    prepare,
)
main = command("python -m experiments.vision", EXPERIMENT)
