"""The command: every method, rank, fine-tuning and trial; table and figures."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import nn

from experiments.language import figures, report
from experiments.language.prepare import facts, load_corpus, notes, prepare
from experiments.language.progress import Clock, EpochLine
from experiments.language.protocol import Protocol
from experiments.language.settings import PART_OF, TINY, Settings
from experiments.lib import cli
from experiments.lib.errors import divergence
from experiments.lib.machine import choose_device, keep_freed_memory, one_thread
from experiments.lib.runs import RunFolder
from experiments.lib.training import EpochLog, known, load_weights, save_weights
from experiments.lib.unused import say, unused

NAME = "language"


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment as a command."""
    settings = cli.parse(
        Settings,
        argv,
        prog="python -m experiments.language",
        description="Retrains a language model on the dialogues of some personas, then fine-tunes "
        "it on those of others, to choose the next utterance among 20.",
    )
    report.show(run(settings), 100 / settings.candidates)


def run(settings: Settings) -> RunFolder:
    """Runs the experiment, or goes on with it, and returns its folder with all figures made.

    Args:
        settings: as given; the defaults are filled in here.

    Raises:
        RunError: the data, the model, the device or the output folder are not usable, or a
            training diverged.
    """
    device = choose_device(settings.device)
    said = unused(settings, PART_OF, settings.kinds())
    settings = settings.resolved(device.type)
    corpus = load_corpus(settings)
    protocol = prepare(settings, corpus, device)
    if device.type == "cpu":
        keep_freed_memory()
    name = Path(known(settings.model)).name
    folder = RunFolder.create(
        settings.out, settings, experiment=NAME, tag=name, resume=settings.resume
    )
    with folder:
        for file in corpus.files:
            for part, sha256 in file.sha256.items():
                folder.add_data(part, sha256)
        folder.note(**facts(corpus, protocol))
        say([*said, *notes(corpus, protocol, settings.list_unmatched)])
        clusters = [str(task.cluster) for task in corpus.testing]
        with one_thread() if settings.model == TINY else contextlib.nullcontext():
            _Run(folder, protocol, name, clusters).everything()
        figures.draw(folder, 100 / settings.candidates)
    return folder


class _Branch(NamedTuple):
    """One retraining, and the fine-tunings that go on from it."""

    method: str
    rank: int | None
    trial: int
    finetunes: list[tuple[str, int | None]]

    @property
    def retraining(self) -> str:
        return f"retrain {self.method} {_shown(self.rank)} {self.trial}"

    def finetuning(self, kind: str, rank: int | None) -> str:
        return f"finetune {self.method} {kind} {_shown(rank)} {self.trial}"


def _shown(rank: int | None) -> str:
    return "-" if rank is None else str(rank)


class _Run:
    """The work of a run, unit by unit."""

    def __init__(self, folder: RunFolder, protocol: Protocol, model: str, tasks: Sequence[str]):
        self.folder, self.protocol, self.settings = folder, protocol, protocol.settings
        self.model, self.tasks = model, tasks
        self.clock = Clock(sum(self._work(branch) for branch in self._branches()))

    def everything(self) -> None:
        for branch in self._branches():
            model = self._retrained(branch)
            for kind, rank in branch.finetunes:
                self._finetuned(branch, model, kind, rank)

    def _branches(self) -> Iterator[_Branch]:
        s = self.settings
        for trial in range(s.first_seed, s.first_seed + known(s.seeds)):
            for method in s.retrain:
                for rank in s.ranks(method):
                    kinds = s.finetunes(method)
                    ranks = {kind: s.ranks(kind) if rank is None else (rank,) for kind in kinds}
                    finetunes = [(kind, r) for kind in kinds for r in ranks[kind]]
                    yield _Branch(method, rank, trial, finetunes)

    def _work(self, branch: _Branch) -> float:
        """What is left to do of a branch, in forward passes of a turn."""
        s, total = self.settings, 0.0
        if branch.method != "none" and not self.folder.done(branch.retraining):
            total += known(s.epochs) * self.protocol.work(branch.method)
        for kind, rank in branch.finetunes:
            if not self.folder.done(branch.finetuning(kind, rank)):
                total += known(s.finetune_epochs) * self.protocol.work(kind)
        return total

    def _retrained(self, branch: _Branch) -> nn.Module:
        method, rank, trial, _ = branch
        if method == "none":
            return self.protocol.new_model(trial)
        unit = branch.retraining
        weights = self.folder.path("weights") / f"{method}-{_shown(rank)}-{trial}.safetensors"
        if self.folder.done(unit):
            model = self.protocol.new_model(trial)
            load_weights(model, weights)
            return model
        labels = {"phase": "retrain", "method": method, "rank": rank, "trial": trial}
        log = EpochLog(self.folder, **labels)
        rates = "--reptile-lr or --reptile-inner-lr" if method == "reptile" else "--lr"
        line = EpochLine(self.clock, unit, self.protocol.work(method))
        with divergence(unit, rates):
            model, result = self.protocol.retrain(method, rank, trial, log, line)
        turns = len(self.protocol.retraining) * len(result.history)
        self.folder.log(
            **{**labels, "phase": "retrained"},
            kept_epoch=result.kept_epoch,
            turns_per_second=round(turns / log.seconds, 2),
        )
        self.folder.add_rows(
            [
                report.row(self.model, method, "", rank, "", trial, metric, value)
                for metric, value in (
                    ("validation_best", result.best_metric),
                    ("validation_last", result.last_metric),
                )
            ]
        )
        save_weights(model, weights)
        self.folder.mark_done(unit)
        return model

    def _finetuned(
        self, branch: _Branch, retrained: nn.Module, kind: str, rank: int | None
    ) -> None:
        unit = branch.finetuning(kind, rank)
        if self.folder.done(unit):
            return
        method, trial = branch.method, branch.trial
        labels = {"method": method, "finetune": kind, "rank": rank, "trial": trial}
        log = EpochLog(self.folder, phase="finetune", **labels)
        line = EpochLine(self.clock, unit, self.protocol.work(kind))
        with divergence(unit, "--finetune-lr"):
            measured = self.protocol.finetune(
                copy.deepcopy(retrained), kind, rank, trial, log, line
            )
        self.folder.add_rows(
            [
                report.row(self.model, method, kind, rank, task, trial, metric, value)
                for metric, values in measured.items()
                for task, value in zip(self.tasks, values, strict=True)
            ]
        )
        self.folder.mark_done(unit)
