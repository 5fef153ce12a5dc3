"""The command: every method, fine-tuning, number of shots and trial; table and figures."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable, Sequence

from torch import nn
from tqdm import tqdm

from experiments.lib import cli
from experiments.lib.errors import divergence
from experiments.lib.machine import choose_device, keep_freed_memory
from experiments.lib.runs import RunFolder
from experiments.lib.training import EpochLog, check_rank, known, load_weights, save_weights
from experiments.lib.unused import say, unused
from experiments.vision import report
from experiments.vision.data import load
from experiments.vision.mixer import Mixer
from experiments.vision.protocol import Protocol
from experiments.vision.settings import PART_OF, Settings

NAME = "vision"


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment as a command."""
    settings = cli.parse(
        Settings,
        argv,
        prog="python -m experiments.vision",
        description="Retrains an MLP-Mixer on binary image tasks, then fine-tunes it on another.",
    )
    folder = run(settings)
    print(report.table(report.summary(folder.rows())))
    for path in sorted(folder.folder.glob("*.png")):
        print(path)


def run(settings: Settings, *, go_on: str = "") -> RunFolder:
    """Runs the experiment, or goes on with it, and returns its folder with all figures made.

    Args:
        settings: as given; the data set's defaults are filled in here.
        go_on: see `RunFolder.create`.

    Raises:
        RunError: the data, the device or the output folder are not usable, or a training diverged.
    """
    device = choose_device(settings.device)
    said = unused(settings, PART_OF, settings.kinds())
    settings = settings.resolved(device.type)
    protocol = Protocol(
        settings, load(settings.data, settings.data_root, settings.download), device
    )
    check_rank(protocol.new_model(0), settings.rank)
    if device.type == "cpu":
        keep_freed_memory()
    folder = RunFolder.create(
        settings.out,
        settings,
        experiment=NAME,
        tag=settings.data,
        resume=settings.resume,
        go_on=go_on,
    )
    with folder:
        folder.add_data(settings.data, protocol.sha256)
        say([*said, *protocol.notes])
        for trial, method in _progress(settings):
            model = _retrained(folder, protocol, method, trial)
            for kind in settings.finetune:
                for shots in settings.shots:
                    _finetuned(folder, protocol, model, method, kind, shots, trial)
        report.figures(folder)
    return folder


def _progress(settings: Settings) -> Iterable[tuple[int, str]]:
    first = settings.first_seed
    trials = range(first, first + known(settings.seeds))
    work = [(trial, method) for trial in trials for method in settings.retrain]
    return tqdm(work, desc=NAME, unit="model", disable=not sys.stderr.isatty())


def _retrained(folder: RunFolder, protocol: Protocol, method: str, trial: int) -> Mixer:
    unit = f"retrain {method} {trial}"
    weights = folder.path("weights") / f"{method}-{trial}.safetensors"
    if folder.done(unit):
        model = protocol.new_model(trial)
        load_weights(model, weights)
        return model
    log = EpochLog(folder, phase="retrain", method=method, trial=trial)
    rates = "--reptile-lr or --reptile-inner-lr" if method == "reptile" else "--lr"
    with divergence(unit, rates):
        model, result = protocol.retrain(method, trial, log)
    images = protocol.images_per_epoch(method) * len(result.history)
    folder.log(
        phase="retrained",
        method=method,
        trial=trial,
        kept_epoch=result.kept_epoch,
        images_per_second=round(images / log.seconds, 1),
    )
    folder.add_rows(
        [
            report.row(protocol.settings.data, method, "", "", trial, metric, value)
            for metric, value in (
                ("validation_best", result.best_metric),
                ("validation_last", result.last_metric),
            )
        ]
    )
    save_weights(model, weights)
    folder.mark_done(unit)
    return model


def _finetuned(
    folder: RunFolder,
    protocol: Protocol,
    retrained: nn.Module,
    method: str,
    kind: str,
    shots: str,
    trial: int,
) -> None:
    unit = f"finetune {method} {kind} {shots} {trial}"
    if folder.done(unit):
        return
    labels = {"method": method, "finetune": kind, "shots": shots, "trial": trial}
    log = EpochLog(folder, phase="finetune", **labels)
    with divergence(unit, "--finetune-lr"):
        result = protocol.finetune(copy.deepcopy(retrained), kind, shots, trial, log)
    folder.add_rows(
        [
            report.row(protocol.settings.data, method, kind, shots, trial, metric, value)
            for metric, value in (
                ("accuracy_best", result.best_metric),
                ("accuracy_last", result.last_metric),
            )
        ]
    )
    folder.mark_done(unit)
