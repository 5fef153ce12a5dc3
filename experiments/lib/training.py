"""Trials of the experiments with PyTorch models: trainings, units of work, rows and their table."""

from __future__ import annotations

import abc
import contextlib
import copy
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from experiments.lib.errors import RunError, divergence
from experiments.lib.manifest import RETRAINED_MODEL
from experiments.lib.processes import rank
from experiments.lib.retrained import RetrainedModels
from experiments.lib.retraining_settings import FINETUNES, PER_TASK, WITH_TASKS
from experiments.lib.runs import RunFolder, read_rows
from experiments.lib.statistics import with_error
from experiments.lib.units import RESULTS
from metalora._files import read_tensors, replacing
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    Checkpoint,
    CheckpointError,
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
    remove_checkpoint,
    reptile,
    standard,
)

CHECKPOINT_SECONDS = 60.0  # between two checkpoints, at least
CHECKPOINT_STEPS = 10  # within an epoch one may be due after so many
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
        """Returns the adapters of fine-tuning with LoRA."""

    def retraining_lora(self, rank: int | None) -> LoRAConfig:
        """Returns the adapters of lora-ml; those of fine-tuning, if not overridden."""
        return self.lora(rank)

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
            self._batch_size(method),
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
            result = lora_ml(model, rounds, config, self.retraining_lora(rank), **common)
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

    def _batch_size(self, method: str) -> int:
        """Returns the samples of a retraining's batch.

        With ``equal_steps`` standard retraining has the fewest that take no more steps than the
        methods with tasks do: on equal tasks as many samples as a round has.
        """
        s = self.settings
        if method != "standard" or not s.equal_steps:
            return s.batch_size
        own = self.loader(self.retraining, s.batch_size, seed=0).rounds_per_task
        steps = max(own) if s.step_per == "round" else sum(own)
        return -(-self.samples_per_epoch(method) // steps)

    def _finetune(
        self,
        model: nn.Module,
        labels: Labels,
        part: Part,
        held_out: Part | None,
        *callbacks: Callback,
        validate_every: int = 1,
    ) -> Result:
        kind = labels["finetune"]
        s, own_seed = self.settings, seed_of("finetuning", labels)
        rounds = self.loader(part, s.finetune_batch_size, seed=own_seed)
        config = self.config(kind, own_seed)
        if labels.get("finetune_lr") is not None:
            config = dataclasses.replace(config, lr=labels["finetune_lr"])
        common: dict[str, Any] = {
            **self.loss,
            "callbacks": [Progress(f"{kind}, trial {labels['trial']}"), *callbacks],
        }
        if held_out is not None:
            common |= {"validation": self.held_out(held_out), "validate_every": validate_every}
        fresh = s.finetune_head == "fresh"
        if kind == "last-layer":
            return finetune_last_layer(model, rounds, config, self.heads, fresh=fresh, **common)
        lora = self.lora(labels.get("rank"))
        fresh = fresh and len(lora.heads) > 0
        return finetune_lora(model, rounds, config, lora, fresh_heads=fresh, **common)


@dataclass(frozen=True)
class Trainings:
    """The trainings of a run, which are its units of work; finished ones are not repeated.

    While a training of more than a minute runs, a checkpoint of it lies in ``checkpoints``.

    Attributes:
        folder: the run's.
        trials: does the trainings.
        columns: of results.csv.
        constant: the columns that are the same in all rows.
        source: where the retrained models are taken from; None retrains them.

    Raises:
        RunError: the folder's results have other columns.
    """

    folder: RunFolder
    trials: Trials[Any]
    columns: Sequence[str]
    constant: Mapping[str, Any]
    source: RetrainedModels | None = None

    def __post_init__(self) -> None:
        self.folder.expect_columns(self.columns)

    def retrained(self, labels: Labels, *callbacks: Callback) -> nn.Module:
        """Returns the model after a retraining, which goes on from the last epoch that was saved.

        Raises:
            RunError: the retraining diverged, or the checkpoint or the weights are damaged.
        """
        method, trial, unit = labels["method"], labels["trial"], unit_name("retrain", labels)
        weights = self.folder.path("weights") / weights_name(labels)
        if self._done(unit):
            return self._loaded(trial, weights)
        if self.source is not None:
            return self._taken(labels, self.source)
        if self.folder.done(unit_name("taken", labels)):
            raise RunError(
                f"--resume: {unit!r} was taken from another run; give the same --retrained"
            )
        log = EpochLog(self.folder, phase="retrain", **labels)
        rates = "--reptile-lr or --reptile-inner-lr" if method == "reptile" else "--lr"
        with divergence(unit, rates), _unusable_checkpoint(unit):
            model, result = self.trials.retrain(
                method, trial, log, *callbacks, self._checkpoint(unit), rank=labels.get("rank")
            )
        samples = self.trials.samples_per_epoch(method) * len(result.history)
        throughput = {f"{self.trials.samples}_per_second": round(samples / log.seconds, 2)}
        self.folder.log(phase="retrained", **labels, kept_epoch=result.kept_epoch, **throughput)
        measured = {"validation_best": result.best_metric, "validation_last": result.last_metric}
        self._add_rows(labels, [{"metric": m, "value": value} for m, value in measured.items()])
        if rank() == 0:
            save_weights(model, weights)
        self.folder.mark_done(unit)
        self._done(unit)
        return model

    def finetuned(self, labels: Labels, retrained: nn.Module, *callbacks: Callback) -> None:
        """Fine-tunes a copy of a retrained model, and goes on as a retraining does."""
        unit = unit_name("finetune", labels)
        if self._done(unit):
            return
        log = EpochLog(self.folder, phase="finetune", **labels)
        with divergence(unit, self.trials.finetune_rates), _unusable_checkpoint(unit):
            measured = self.trials.finetune(
                copy.deepcopy(retrained), labels, log, *callbacks, self._checkpoint(unit)
            )
        self._add_rows(labels, measured)
        self.folder.mark_done(unit)
        self._done(unit)

    def _checkpoint(self, unit: str) -> Checkpoint:
        return Checkpoint(
            self._checkpoint_path(unit),
            min_seconds=CHECKPOINT_SECONDS,
            every_steps=CHECKPOINT_STEPS,
        )

    def _checkpoint_path(self, unit: str) -> Path:
        return self.folder.path("checkpoints") / f"{unit.replace(' ', '-')}.safetensors"

    def _done(self, unit: str) -> bool:
        """Returns whether a training is finished; if so, its checkpoint is removed."""
        done = self.folder.done(unit)
        if done and rank() == 0:
            remove_checkpoint(self._checkpoint_path(unit))
        return done

    def _taken(self, labels: Labels, source: RetrainedModels) -> nn.Module:
        """Returns a model of another run, and takes over what was measured of it there."""
        found = source.run_with(labels["method"], unit_name("retrain", labels))
        path = found / "weights" / weights_name(labels)
        model = self._loaded(labels["trial"], path)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        self.folder.add_data(f"{RETRAINED_MODEL} {path.stem}", sha256)
        taken = unit_name("taken", labels)
        if not self.folder.done(taken):
            wanted = row((*labels, "finetune"), labels).items()
            rows = read_rows(found / RESULTS)
            of_it = [one for one in rows if all(one[name] == str(v) for name, v in wanted)]
            self._add_rows(labels, [{k: one[k] for k in ("metric", "value")} for one in of_it])
            self.folder.mark_done(taken)
        return model

    def _loaded(self, trial: int, weights: Path) -> nn.Module:
        model = self.trials.new_model(trial)
        load_weights(model, weights)
        return model

    def _add_rows(self, labels: Labels, measured: Iterable[Mapping[str, Any]]) -> None:
        same = {**self.constant, **labels}
        self.folder.add_rows([row(self.columns, {**same, **values}) for values in measured])


class EpochLog(Callback):
    """Writes every epoch to the run's metrics, and measures the throughput.

    A training that goes on from a checkpoint writes its earlier epochs again, as a resumed run
    begins without what unfinished units wrote.
    """

    def __init__(self, run: RunFolder, **labels: Any):
        self._run, self._labels = run, labels
        self._epochs: list[dict[str, Any]] = []

    @property
    def seconds(self) -> float:
        """Returns how long all epochs took, those before an interruption included."""
        return sum(epoch["seconds"] for epoch in self._epochs)

    def on_start(self, training: Training) -> None:
        self._since = time.monotonic()

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        now = time.monotonic()
        self._add({**record, "seconds": round(now - self._since, 4)})
        self._since = now

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"epochs": self._epochs}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        for epoch in values["epochs"]:
            self._add(epoch)
        self._since = time.monotonic()

    def _add(self, epoch: dict[str, Any]) -> None:
        self._epochs.append(epoch)
        self._run.log(**self._labels, **epoch)


@contextlib.contextmanager
def _unusable_checkpoint(unit: str) -> Iterator[None]:
    """Turns a checkpoint that cannot be resumed from into a `RunError`.

    One that cannot be written raises the `OSError` itself, which the run folder explains.
    """
    try:
        yield
    except CheckpointError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise RunError(f"{unit}: {error}; without that file it starts again") from None


def open_retrained(
    settings: Any,
    experiment: str,
    part_of: Mapping[str, Sequence[str]],
    retrainings: Iterable[Labels],
    data: Mapping[str, str],
) -> RetrainedModels | None:
    """Returns where the retrained models come from; None if this run makes them.

    Args:
        settings, part_of, data: see `RetrainedModels`.
        experiment: the experiment's name.
        retrainings: labels of all that are wanted.

    Raises:
        RunError: the runs in ``settings.retrained`` do not have them all.
    """
    if not settings.retrained:
        return None
    source = RetrainedModels(settings.retrained, experiment, settings, part_of, data)
    for labels in retrainings:
        source.run_with(labels["method"], unit_name("retrain", labels))
    return source


def seed_of(purpose: str, labels: Labels) -> int:
    """Returns the seed of a fine-tuning: that of its trial, or of one of several draws in it."""
    draw = labels.get("draw") or 0
    return derive_seed(purpose, labels["trial"], *([draw] if draw else []))


def weights_name(labels: Labels) -> str:
    """Returns the name of the file with a retrained model, such as "lora-ml-8-0.safetensors"."""
    return "-".join(map(_shown, labels.values())) + ".safetensors"


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
            value: Any = line.get(name)
            if empty(value):
                cell = "-"
            elif f"{name}_se" in line:
                cell = with_error(value, line[f"{name}_se"])
            else:
                cell = str(value)
            align = str.ljust if name in ("method", "finetune") else str.rjust
            cells.append(align(cell, len(title)))
        text.append(" ".join(cells))
    return text


def empty(value: Any) -> bool:
    """Returns whether a summary has no value: nothing, or a number that is not known."""
    return value in (None, "") or (isinstance(value, float) and math.isnan(value))


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

    data = save(_each_once(model))
    with replacing(path) as file:
        file.write(data)


def load_weights(model: nn.Module, path: Path) -> None:
    """Loads into the model what `save_weights` wrote.

    Raises:
        RunError: the file is missing, damaged, or another model's.
    """
    from safetensors import SafetensorError

    try:
        found = read_tensors(path, "load_weights")[0]
        if found.keys() != _each_once(model).keys():
            raise RuntimeError("another model's")
        model.load_state_dict(found, strict=False)  # a shared weight is there once
    except (OSError, SafetensorError, RuntimeError):
        raise RunError(f"{path} is missing or damaged; start a new run") from None


def _each_once(model: nn.Module) -> dict[str, Tensor]:
    """Returns the model's state, a weight that stands in two places by its first name alone."""
    names: dict[int, str] = {}
    return {
        name: value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
        if names.setdefault(id(value), name) == name
    }


def _shown(label: Any) -> str:
    return "-" if label is None else str(label)
