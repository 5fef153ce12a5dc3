"""A training as its callbacks see it, and what every training takes by keyword."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor, nn

from metalora._checks import did_you_mean
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds
from metalora.meta.evaluation import Evaluation
from metalora.meta.steps import Calls, Step

Validation = Rounds | Callable[[nn.Module], Evaluation | float]
"""A loader, of which the accuracy is taken, or a function of the model."""


@dataclass
class Training:
    """Where a training stands: what callbacks see."""

    model: nn.Module
    rounds: Rounds
    step: Step
    config: TrainConfig
    validation: Validation | None
    callbacks: list[Callback]
    steps_per_epoch: int
    validate_every: int = 1
    steps_done: int = 0
    next_epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    kept_epoch: int = -1

    def validates(self, epoch: int) -> bool:
        """Whether the validation is measured after this epoch."""
        due = (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.config.epochs
        return self.validation is not None and due


class Callback:
    """Hooks into the training loop; each may be overridden."""

    def on_start(self, training: Training) -> None:
        """Before the first epoch."""

    def on_step(self, training: Training, loss: Tensor) -> None:
        """After an optimiser step; ``loss`` is not synchronised with the host."""

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """After an epoch and its validation; ``record`` is the newest of the history."""

    def on_end(self, training: Training) -> None:
        """After the last epoch."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What must survive an interruption: tensors, and values that JSON can hold.

        Called after `on_start`, before any epoch, and after every epoch.
        """
        return {}, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` returned; called after `on_start`."""


class Watch(TypedDict, total=False):
    """What watches a training.

    Attributes:
        validation: a loader, of which the accuracy is taken, or a function of the model that
            returns an `Evaluation` or a number, the higher the better. None by default.
        validate_every: measure it after every so many epochs only, and after the last one. 1 by
            default.
        callbacks: called in their order, see `Callback`; `KeepBest` decides which epoch's weights
            stay. None by default.
    """

    validation: Validation | None
    validate_every: int
    callbacks: Iterable[Callback]


class Options(Calls, Watch, total=False):
    """What every retraining and fine-tuning takes by keyword: `Calls` and `Watch` together."""


def check_options(function: str, options: Mapping[str, Any]) -> None:
    """Raises TypeError, naming the argument, for a keyword that is not one of `Options`."""
    for name in options:
        if name not in Options.__annotations__:
            raise TypeError(
                f"{function}() got an unexpected keyword argument {name!r}"
                f"{did_you_mean(name, Options.__annotations__)}"
            )


def split_options(options: Options) -> tuple[Calls, Watch]:
    """Options as what a `Step` takes and what `metalora.meta.train` takes."""

    def part(kind: Any) -> Any:
        return {name: value for name, value in options.items() if name in kind.__annotations__}

    return part(Calls), part(Watch)
