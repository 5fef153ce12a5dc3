"""Callbacks: a progress bar, a log of the metrics, early stopping, keeping the best epoch."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor

from metalora._checks import check_count, check_nonnegative
from metalora._files import replacing
from metalora.meta.identity import extra_state_of, shapes_of, tensors_of
from metalora.meta.training import Callback, Training, rank_of


class Progress(Callback):
    """A progress bar with the loss and the time left.

    Shows nothing if stderr is no terminal or the package tqdm is not installed.

    Args:
        label: the text before the bar.
    """

    def __init__(self, label: str = "train") -> None:
        self.label = label
        self._bar: Any = None

    def on_start(self, training: Training) -> None:
        """Opens the bar."""
        self._bar = None
        if not sys.stderr.isatty() or training.distribution.rank > 0:
            return
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            total = training.config.epochs * training.steps_per_epoch
            self._bar = tqdm(total=total, desc=self.label, leave=False)

    def on_step(self, training: Training, loss: Tensor) -> None:
        """Moves the bar."""
        if self._bar is not None:
            self._bar.update(training.steps_done - self._bar.n)

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Shows the epoch's loss and validation."""
        if self._bar is not None:
            shown = {k: f"{record[k]:.4g}" for k in ("loss", "validation") if k in record}
            self._bar.set_postfix(shown)

    def on_stop(self, training: Training) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.close()


class MetricsLog(Callback):
    """Appends each epoch's record to a file, as a line of JSON.

    When a training resumes from a `Checkpoint`, the lines that it wrote after the checkpoint's last
    save are removed, so that each epoch has one line. Lines with another ``extra`` stay. No other
    process should append to the file at that moment. Of processes that train together the first
    writes.

    Args:
        path: the file; its folder is made if it does not exist.
        extra: fields of every line, such as the method and the seed.
    """

    def __init__(self, path: str | Path, **extra: Any) -> None:
        self.path, self.extra = Path(path), extra
        self._saved: int | None = None

    def on_start(self, training: Training) -> None:
        """Makes the folder; repairs the end of the file, if a process was killed as it wrote."""
        self._saved = None
        self._writes = training.distribution.rank == 0
        if self._writes:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._replace(0, lambda line: False)
        self._length = self.path.stat().st_size if self.path.exists() else 0

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Writes one line."""
        if not self._writes:
            return
        if self._saved is not None:
            own = json.loads(json.dumps(self.extra)).items()
            epoch = record["epoch"]
            self._replace(
                self._saved,
                lambda line: own <= line.items() and line.get("epoch") in range(epoch, 2**63),
            )
            self._saved = None
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**self.extra, **record}) + "\n")
            self._length = file.tell()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """How long the file is, in bytes."""
        return {}, {"length": self._length}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self._saved = check_count("MetricsLog", "length", values["length"], minimum=0)

    def _replace(self, start: int, stale: Callable[[dict[str, Any]], Any]) -> None:
        """Removes the stale lines behind the first ``start`` bytes, and half a line at the end."""
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        lines = data[start:].splitlines(keepends=True)
        kept = data[:start] + b"".join(line for line in lines if _is_kept(line, stale))
        if not kept.endswith(b"\n") and kept:
            kept += b"\n"  # whole, but for its end
        if kept != data:
            with replacing(self.path) as file:
                file.write(kept)


def _is_kept(line: bytes, stale: Callable[[dict[str, Any]], Any]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:
        return line.endswith(b"\n")
    return not (isinstance(record, dict) and stale(record))


class EarlyStopping(Callback):
    """Ends the training once the validation has not improved for some time.

    The weights are then those of the last epoch; with `KeepBest` beside it, those of the best. A
    training that was ended stays so, whatever the patience it is resumed with.

    Args:
        patience: the training ends once so many validations in a row were no better than the best
            one before them.
        min_delta: what a validation must be above the best one to be better.

    Raises:
        TypeError, ValueError: if ``patience`` is no count, ``min_delta`` negative, or, at the
            start, if the training has no validation.
    """

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self.patience = check_count("EarlyStopping", "patience", patience)
        self.min_delta = check_nonnegative("EarlyStopping", "min_delta", min_delta)

    def on_start(self, training: Training) -> None:
        """Forgets earlier trainings."""
        if training.validation is None:
            raise ValueError("EarlyStopping: needs a validation to watch; pass validation=")
        self.best, self.since = -math.inf, 0

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Counts the validations that are no better, and ends the training where they suffice."""
        if "validation" not in record:
            return
        if record["validation"] > self.best + self.min_delta:
            self.best, self.since = record["validation"], 0
            return
        self.since += 1
        if self.since >= self.patience:
            training.stopping = True

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best validation so far, and how many since were no better."""
        return {}, {"best": self.best, "since": self.since}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` returned.

        Raises:
            ValueError: if it is of another callback.
        """
        best, since = values["best"], values["since"]
        if type(best) is not float or type(since) is not int or since < 0:
            raise ValueError("best must be a float and since a count")
        self.best, self.since = best, since


class KeepBest(Callback):
    """Keeps the weights of the epoch with the highest validation, and puts them back at the end.

    Of equal epochs the first is kept; epochs whose validation was not measured are passed over. A
    NaN is worse than any number.
    """

    def on_start(self, training: Training) -> None:
        """Forgets earlier trainings."""
        if training.validation is None:
            raise ValueError("KeepBest: needs a validation to choose by; pass validation=")
        self.best, self.epoch = -math.inf, -1
        self.weights: dict[str, Tensor] = {}
        self._extra: dict[str, Any] = {}
        self._wanted = shapes_of(tensors_of(training.model))

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Copies the weights if they are the best so far."""
        if "validation" not in record:
            return
        if not self.weights or rank_of(record["validation"]) > rank_of(self.best):
            self.best, self.epoch = record["validation"], record["epoch"]
            self.weights = {n: t.detach().clone() for n, t in tensors_of(training.model).items()}
            self._extra = deepcopy(extra_state_of(training.model))

    def on_end(self, training: Training) -> None:
        """Puts the best weights back."""
        if not self.weights:  # a callback ended the training before it was validated
            return
        training.model.load_state_dict({**self.weights, **self._extra})
        training.kept_epoch = self.epoch
        self.weights = {}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The best weights so far, their epoch and its validation."""
        return self.weights, {"best": self.best, "epoch": self.epoch}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` returned.

        Raises:
            ValueError: if it is of another model.
        """
        best, epoch = values["best"], values["epoch"]
        if type(best) is not float or type(epoch) is not int:
            raise ValueError("best must be a float and epoch an int")
        if tensors and shapes_of(tensors) != self._wanted:
            raise ValueError("the weights of the best epoch must be those of the model")
        if bool(tensors) != (epoch >= 0):
            raise ValueError(f"there must be weights of the best epoch, {epoch}")
        self.weights, self.best, self.epoch = tensors, best, epoch
