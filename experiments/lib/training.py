"""Trials of the experiments with PyTorch models: trainings, units of work, rows and their table."""

from __future__ import annotations

import abc
import copy
import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import nn

from experiments.lib.errors import RunError, divergence
from experiments.lib.retraining_settings import FINETUNES, PER_TASK, WITH_TASKS
from experiments.lib.runs import RunFolder
from experiments.lib.statistics import with_error
from metalora._files import read_tensors, replacing
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    KeepBest,
    Progress,
    Result,
    RoundLoader,
    TrainConfig,
    Training,
    derive_seed,
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    refit_heads,
    reptile,
    standard,
)

Part = TypeVar("Part")  # of the data: samples with their tasks
Labels = Mapping[str, Any]  # what tells one training from the others: method, trial and the like


class Trials(abc.ABC, Generic[Part]):
    """What an experiment does in its trials: retrains models and fine-tunes them on other tasks.

    Attributes:
        settings: resolved `experiments.lib.retraining_settings.RetrainingSettings`.
        heads: names of the layers that exist once per task.
        with_head: the methods that leave a shared head which may be refitted.
        fixed: fields of `TrainConfig` that are no settings.
        inner: keywords of `reptile` that are not shared.
        loss: the keyword ``loss`` of all trainings; empty for the default.
        samples: what is counted for the throughput.
        finetune_rates: the flags to lower if a fine-tuning diverges.
        retraining, validation: the retraining tasks' data.
    """

    settings: Any
    heads: Sequence[str]
    with_head: Sequence[str]
    fixed: Mapping[str, Any]
    inner: Mapping[str, Any]
    loss: Mapping[str, Any] = {}
    samples: str
    finetune_rates: str = "--finetune-lr"
    retraining: Part
    validation: Part

    @abc.abstractmethod
    def new_model(self, seed: int) -> nn.Module:
        """Makes the model at the start of a trial, the same for every method."""

    @abc.abstractmethod
    def loader(self, part: Part, batch_size: int, **keywords: Any) -> RoundLoader:
        """Makes batches to train on; ``keywords`` are those of `RoundLoader`."""

    @abc.abstractmethod
    def held_out(self, part: Part) -> Any:
        """Returns the keyword ``validation`` of a training, which measures held-out accuracy."""

    @abc.abstractmethod
    def lora(self, rank: int | None) -> LoRAConfig:
        """Returns the adapters of lora-ml and of fine-tuning with LoRA."""

    @abc.abstractmethod
    def samples_per_epoch(self, method: str) -> int:
        """Returns how many samples an epoch of retraining runs through the model."""

    @abc.abstractmethod
    def finetune(
        self, model: nn.Module, labels: Labels, *callbacks: Callback
    ) -> list[dict[str, Any]]:
        """Adapts a retrained model, in place, to the test tasks.

        Returns:
            what was measured: columns of results.csv, each time with a metric and its value.
        """

    def max_rounds(self, method: str) -> int | None:
        """Returns the rounds after which an epoch of retraining ends early."""
        return None

    def config(self, kind: str, seed: int) -> TrainConfig:
        """Returns how a method or a fine-tuning trains: `TrainConfig`'s fields among the settings.

        A setting of Reptile or of the fine-tunings has a prefix if it differs from that of the
        other methods, such as ``reptile_lr`` and ``finetune_epochs``.
        """
        prefix = "finetune_" if kind in FINETUNES else "reptile_" if kind == "reptile" else ""
        values = dict(self.fixed)
        for name in (field.name for field in dataclasses.fields(TrainConfig)):
            if name in PER_TASK and kind not in WITH_TASKS:
                continue
            given = [n for n in (prefix + name, name) if hasattr(self.settings, n)]
            if given:
                values[name] = getattr(self.settings, given[0])
        return TrainConfig(seed=seed, **values)

    def retrain(
        self, method: str, seed: int, *callbacks: Callback, rank: int | None = None
    ) -> tuple[nn.Module, Result]:
        """Returns a plain model after a retraining, at its best epoch on held-out data."""
        s, own_seed = self.settings, derive_seed("retraining", seed)
        model = self.new_model(seed)
        rounds = self.loader(
            self.retraining,
            s.batch_size,
            seed=own_seed,
            order=s.standard_order if method == "standard" else "rounds",
            max_rounds=self.max_rounds(method),
        )
        config = self.config(method, own_seed)
        common: dict[str, Any] = {
            **self.loss,
            "validation": self.held_out(self.validation),
            "callbacks": [Progress(f"{method}, trial {seed}"), KeepBest(), *callbacks],
        }
        if method == "lora-ml":
            result = lora_ml(model, rounds, config, self.lora(rank), **common)
        elif method == "last-layer-ml":
            result = last_layer_ml(model, rounds, config, self.heads, **common)
        elif method == "standard":
            result = standard(model, rounds, config, **common)
        else:
            steps, lr = s.reptile_inner_steps, s.reptile_inner_lr
            own = {"inner_steps": steps, "inner_lr": lr, **self.inner}
            result = reptile(model, rounds, config, **own, **common)
        if method in self.with_head and s.shared_head == "refit":
            own_seed = derive_seed("refitting", seed)
            pooled = self.loader(
                self.retraining, s.finetune_batch_size, seed=own_seed, order="pooled"
            )
            config = self.config("last-layer", own_seed)  # as long as a fine-tuning
            progress = [Progress(f"{method}, shared head, trial {seed}")]
            refit_heads(model, pooled, config, self.heads, callbacks=progress, **self.loss)
        return model, result

    def _finetune(
        self,
        model: nn.Module,
        labels: Labels,
        part: Part,
        held_out: Part | None,
        *callbacks: Callback,
    ) -> Result:
        kind, seed = labels["finetune"], labels["trial"]
        s, own_seed = self.settings, derive_seed("finetuning", seed)
        rounds = self.loader(part, s.finetune_batch_size, seed=own_seed)
        config = self.config(kind, own_seed)
        common: dict[str, Any] = {
            **self.loss,
            "validation": None if held_out is None else self.held_out(held_out),
            "callbacks": [Progress(f"{kind}, trial {seed}"), *callbacks],
        }
        fresh = s.finetune_head == "fresh"
        if kind == "last-layer":
            return finetune_last_layer(model, rounds, config, self.heads, fresh=fresh, **common)
        lora = self.lora(labels.get("rank"))
        fresh = fresh and len(lora.heads) > 0
        return finetune_lora(model, rounds, config, lora, fresh_heads=fresh, **common)


@dataclass(frozen=True)
class Trainings:
    """The trainings of a run, which are its units of work; finished ones are not repeated.

    Attributes:
        folder: the run's.
        trials: does the trainings.
        columns: of results.csv.
        constant: the columns that are the same in all rows.
    """

    folder: RunFolder
    trials: Trials[Any]
    columns: Sequence[str]
    constant: Mapping[str, Any]

    def retrained(self, labels: Labels, *callbacks: Callback) -> nn.Module:
        """Returns the model after a retraining."""
        method, trial, unit = labels["method"], labels["trial"], unit_name("retrain", labels)
        name = "-".join(map(_shown, labels.values()))
        weights = self.folder.path("weights") / f"{name}.safetensors"
        if self.folder.done(unit):
            model = self.trials.new_model(trial)
            load_weights(model, weights)
            return model
        log = EpochLog(self.folder, phase="retrain", **labels)
        rates = "--reptile-lr or --reptile-inner-lr" if method == "reptile" else "--lr"
        with divergence(unit, rates):
            model, result = self.trials.retrain(
                method, trial, log, *callbacks, rank=labels.get("rank")
            )
        samples = self.trials.samples_per_epoch(method) * len(result.history)
        throughput = {f"{self.trials.samples}_per_second": round(samples / log.seconds, 2)}
        self.folder.log(phase="retrained", **labels, kept_epoch=result.kept_epoch, **throughput)
        measured = {"validation_best": result.best_metric, "validation_last": result.last_metric}
        self._add_rows(labels, [{"metric": m, "value": value} for m, value in measured.items()])
        save_weights(model, weights)
        self.folder.mark_done(unit)
        return model

    def finetuned(self, labels: Labels, retrained: nn.Module, *callbacks: Callback) -> None:
        """Fine-tunes a copy of a retrained model."""
        unit = unit_name("finetune", labels)
        if self.folder.done(unit):
            return
        log = EpochLog(self.folder, phase="finetune", **labels)
        with divergence(unit, self.trials.finetune_rates):
            measured = self.trials.finetune(copy.deepcopy(retrained), labels, log, *callbacks)
        self._add_rows(labels, measured)
        self.folder.mark_done(unit)

    def _add_rows(self, labels: Labels, measured: Iterable[Mapping[str, Any]]) -> None:
        same = {**self.constant, **labels}
        self.folder.add_rows([row(self.columns, {**same, **values}) for values in measured])


class EpochLog(Callback):
    """Writes every epoch to the run's metrics, and measures the throughput."""

    def __init__(self, run: RunFolder, **labels: Any):
        self._run, self._labels = run, labels
        self.seconds = 0.0

    def on_start(self, training: Training) -> None:
        self._since = time.monotonic()

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        now = time.monotonic()
        self.seconds += now - self._since
        self._run.log(**self._labels, **record, seconds=round(now - self._since, 4))
        self._since = now


def unit_name(phase: str, labels: Labels) -> str:
    """Returns the name of a training in its run, such as "retrain lora-ml 8 0"."""
    return " ".join([phase, *map(_shown, labels.values())])


def row(columns: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the values of all columns; "" stands for those that are missing or None."""
    return {name: "" if values.get(name) is None else values[name] for name in columns}


def table(lines: Iterable[Mapping[str, Any]], titles: Mapping[str, str]) -> list[str]:
    """Returns a summary as text, accuracies with their standard error in brackets.

    Args:
        lines: of `experiments.lib.statistics.summarize`.
        titles: of the columns, by key or metric, each as wide as its column.
    """
    text = [" ".join(titles.values())]
    for line in lines:
        cells = []
        for name, title in titles.items():
            known = f"{name}_se" in line
            cell = with_error(line[name], line[f"{name}_se"]) if known else str(line[name] or "-")
            align = str.ljust if name in ("method", "finetune") else str.rjust
            cells.append(align(cell, len(title)))
        text.append(" ".join(cells))
    return text


def check_rank(model: nn.Module, rank: int) -> None:
    """Refuses a rank that no matrix of the model can have.

    Raises:
        RunError: ``rank`` is above the smaller side of every linear layer.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    largest = max(min(layer.in_features, layer.out_features) for layer in layers)
    if rank > largest:
        raise RunError(
            f"--rank must be at most {largest}, the largest of any linear layer of the model, "
            f"got {rank}"
        )


def save_weights(model: nn.Module, path: Path) -> None:
    """Writes the model's state as safetensors; if interrupted, no part of it is left."""
    from safetensors.torch import save

    data = save(model.state_dict())
    with replacing(path) as file:
        file.write(data)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads into the model what `save_weights` wrote.

    Raises:
        RunError: the file is missing, damaged, or another model's.
    """
    from safetensors import SafetensorError

    try:
        model.load_state_dict(read_tensors(path, "load_weights")[0])
    except (OSError, SafetensorError, RuntimeError):
        raise RunError(f"--resume: {path} is missing or damaged; start a new run") from None


def _shown(label: Any) -> str:
    return "-" if label is None else str(label)
