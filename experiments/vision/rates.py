"""The rates of fine-tuning that another run has shown to be the best, on another test task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.lib.choices import finished_run
from experiments.lib.errors import RunError
from experiments.lib.runs import read_rows
from experiments.lib.statistics import best_choices
from experiments.lib.units import RESULTS
from experiments.vision.settings import VisionSettings
from experiments.vision.summary import LAST

FLAG = "--finetune-lr-from"
KEY = ("method", "finetune", "shots")
Rates = Mapping[tuple[str, ...], float]  # by method, fine-tuning and number of images


def chosen_rates(settings: VisionSettings, experiment: str, sha256: str) -> Rates | None:
    """Returns the rate of each fine-tuning; None if this run has its own rates.

    Args:
        settings: resolved settings.
        experiment: the experiment's name.
        sha256: checksum of the images.

    Raises:
        RunError: the run in ``settings.finetune_lr_from`` is not finished, has seen a class of the
            test task or other images, or lacks one of the fine-tunings.
    """
    folder = settings.finetune_lr_from
    if folder is None:
        return None
    manifest = finished_run(folder, FLAG, experiment, {settings.data: sha256})
    seen = {kind for pair in manifest["settings"]["tasks"] for kind in pair.split("-")}
    if not seen.isdisjoint(settings.tasks[-1].split("-")):
        raise RunError(
            f"{FLAG}: the run in {folder} has seen the test task {settings.tasks[-1]}; rates must "
            "be chosen without it, for instance with --tasks " + " ".join(settings.tasks[:-1])
        )
    rates = best_choices(read_rows(folder / RESULTS), KEY, "finetune_lr", LAST)
    for method in settings.retrain:
        for kind in settings.finetune:
            for shots in settings.shots:
                if (method, kind, shots) not in rates:
                    raise RunError(
                        f"{FLAG}: the run in {folder} has not fine-tuned {method} with {kind} on "
                        f"{shots} images; resume it with these"
                    )
    return {key: float(rate) for key, rate in rates.items()}


def described(rates: Rates) -> dict[str, Any]:
    """Returns the rates for a manifest, by the words of their key."""
    return {" ".join(key): rate for key, rate in rates.items()}
