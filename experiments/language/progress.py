"""Progress lines, for runs of hours whose stderr may be a file."""

from __future__ import annotations

import sys
import time
from typing import Any

from torch import Tensor
from tqdm import tqdm

from metalora.meta import Callback, Training


class Clock:
    """Estimates the time left from the work done since the run began or was resumed."""

    def __init__(self, total: float) -> None:
        self._total, self._done, self._since = total, 0.0, time.monotonic()

    def skip(self, work: float) -> None:
        """Leaves out work that had been done before."""
        self._total -= work

    def left(self, done: float) -> str:
        """Returns the time left in words, after ``done`` more work."""
        self._done += done
        left = max(self._total - self._done, 0.0)  # rounding may make it slightly negative
        seconds = (time.monotonic() - self._since) * left / self._done
        if seconds < 60:
            return f"{seconds:.0f} s"
        minutes = round(seconds / 60)
        return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class EpochLine(Callback):
    """Writes a line on stderr after every epoch."""

    def __init__(self, clock: Clock, unit: str, work: float) -> None:
        self._clock, self._unit, self._work = clock, unit, work
        self._epochs = 0

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        self._epochs += 1
        left = self._clock.left(self._work)
        if training.distribution.rank > 0:
            return
        measured = [f"loss {record['loss']:.4f}"]
        if "validation" in record:
            measured.append(f"accuracy {100 * record['validation']:.1f} %")
        tqdm.write(
            f"{self._unit}: epoch {record['epoch'] + 1} of {training.config.epochs}, "
            f"{', '.join(measured)}; {left} left",
            file=sys.stderr,
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {"epochs": self._epochs}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        self._epochs = values["epochs"]
        self._clock.skip(self._work * self._epochs)
