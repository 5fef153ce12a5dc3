"""A training as its callbacks see it, and what every training takes by keyword."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from metalora._checks import did_you_mean, short
from metalora.adapters import task_parameters
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds
from metalora.meta.distribution import Distribution
from metalora.meta.evaluation import Evaluation
from metalora.meta.identity import digest_of_tensors, extra_state_of, identity_of
from metalora.meta.steps import Calls, Step

Validation = Rounds | Callable[[nn.Module], Evaluation | float]
"""A loader, of which the accuracy is taken, or a function of the model."""


@dataclass
class Training:
    """Where a training stands: what callbacks see.

    ``steps_in_epoch`` counts the steps of an epoch that is not finished, ``losses`` are theirs. A
    callback sets ``stopping`` to end the training after the epoch, which is not validated for
    it; of several processes the first decides.
    """

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
    steps_in_epoch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    stopping: bool = False
    random_state: dict[str, Tensor] = field(default_factory=dict)
    _identity: dict[str, Any] | None = None

    @property
    def distribution(self) -> Distribution:
        """The processes that train together."""
        return self.step.distribution

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def identity(self) -> dict[str, Any]:
        """What must be equal for a training to resume where another stopped, as it is at the start.

        It is the same in all processes, and for any number of them.

        Raises:
            TypeError: if the loader's ``identity()`` returns what JSON cannot hold.
            ValueError: if the model's ``state_dict`` holds more than tensors.
        """
        if self._identity is None:
            self._identity = self._describe()
        return self._identity

    def _describe(self) -> dict[str, Any]:
        model = self.model
        own = {id(p) for p in task_parameters(model)}
        per_task = {n for n, p in model.named_parameters(remove_duplicate=False) if id(p) in own}
        shared: dict[str, Tensor] = {}
        adapters: dict[str, Tensor] = {}
        if extra := list(extra_state_of(model)):
            raise ValueError(
                "train: a model that is kept in a checkpoint, or trained on several processes, "
                f"must have a state_dict of tensors alone, but get_extra_state gives {extra[0]!r}"
            )
        for name, tensor in model.state_dict().items():
            (adapters if name in per_task else shared)[name] = tensor
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        config = asdict(self.config)
        for name in ("parallel", "betas", "eps", "momentum"):
            if config[name] == getattr(TrainConfig, name):
                del config[name]  # as in files of before there was such a field
        found = {
            **config,
            "step": type(self.step).__name__,
            **self.step.settings,
            "rounds": identity_of(self.rounds),
            "validation": identity_of(self.validation),
            "steps_per_epoch": self.steps_per_epoch,
            "modules": _digest(described(model)),
            "trained": f"{len(trained)} parameters {_digest(json.dumps(trained))}",
            "device": self.device.type,
            "initial_weights": digest_of_tensors(shared)[:16],
        }
        try:
            found = dict(json.loads(json.dumps(found)))
        except (TypeError, ValueError) as error:
            raise TypeError(
                "Checkpoint: identity() must return what JSON can hold, got "
                f"{short(found['rounds'])} of the data and {short(found['validation'])} of the "
                f"validation ({error})"
            ) from error
        self.distribution.check_same({**found, **_versions()}, self.device)
        return {**found, "initial_adapters": self._digest_of_adapters(adapters)[:16]}

    def _digest_of_adapters(self, adapters: dict[str, Tensor]) -> str:
        if not self.distribution.by_task:
            return digest_of_tensors(adapters)
        of_tasks = {
            task: digest_of_tensors({name: tensor[i] for name, tensor in adapters.items()})
            for i, task in enumerate(self.distribution.tasks)
        }
        every: dict[str, str] = {}
        for text in self.distribution.gather_text(json.dumps(of_tasks), self.device):
            every.update(json.loads(text))
        return _digest(json.dumps(every, sort_keys=True))

    def validates(self, epoch: int) -> bool:
        """Whether the validation is measured after this epoch."""
        due = (epoch + 1) % self.validate_every == 0 or epoch + 1 == self.config.epochs
        return self.validation is not None and due


def described(part: Any) -> str:
    """``repr`` of a model or layer, the same whatever number of its tasks is held here."""
    return re.sub(r"tasks=\d+ of (\d+)", r"tasks=\1", repr(part))


def _digest(text: str) -> str:
    return hashlib.sha256((text + digest_of_tensors({})).encode()).hexdigest()[:16]


@functools.cache
def _versions() -> dict[str, str]:
    """What processes that train together run: torch, and every module of this package."""
    code = hashlib.sha256()
    folder = Path(__file__).resolve().parents[1]
    for path in sorted(folder.rglob("*.py")):
        code.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return {"torch": str(torch.__version__), "code_of_metalora": code.hexdigest()[:16]}


def rank_of(validation: float) -> tuple[bool, float]:
    """What validations are compared by: NaN is worse than any number."""
    return not math.isnan(validation), validation


class Callback:
    """Hooks into the training loop; each may be overridden.

    Before every step the loop sets ``lr`` of the optimiser's groups to ``initial_lr`` times the
    schedule, so a callback that is to change a learning rate sets ``group["initial_lr"]``.
    """

    def on_start(self, training: Training) -> None:
        """Before the first epoch."""

    def on_step(self, training: Training, loss: Tensor) -> None:
        """After an optimiser step; ``loss`` is not synchronised with the host."""

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """After an epoch and its validation; ``record`` is the newest of the history."""

    def on_end(self, training: Training) -> None:
        """After the last epoch; not if the training fails."""

    def on_stop(self, training: Training) -> None:
        """At the very end, also if the training fails: closes what `on_start` opened.

        Called in reverse order, last of all, and for those callbacks alone whose `on_start` was.
        """

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What must survive an interruption: tensors, and values that JSON can hold.

        Called after `on_start`, before any epoch, and after every epoch, or every few steps.
        """
        return {}, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Restores what `state` returned; called after `on_start`."""


class Watch(TypedDict, total=False):
    """What watches a training.

    Attributes:
        validation: a loader, of which the accuracy is taken, or a function of the model, which is
            called in evaluation mode and returns an `Evaluation` or a number, the higher the
            better. None by default.
        validate_every: measure it after every so many epochs only, and after the last one of the
            config. 1 by default.
        callbacks: called in their order, see `Callback`; `KeepBest` decides which epoch's weights
            stay, `EarlyStopping` when there have been epochs enough. None by default.
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
