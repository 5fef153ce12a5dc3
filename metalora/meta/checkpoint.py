"""Interrupting a training and resuming it, with bitwise the same result."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metalora._checks import check_count, check_nonnegative, first_line, first_of, short
from metalora._files import parse_tensors, remove_partials, replacing, safetensors_torch
from metalora._warn import warn_user
from metalora.adapters import adapted_layers
from metalora.meta.identity import (
    ABSENT,
    differences,
    digest_of_tensors,
    shapes_of,
)
from metalora.meta.optimizer import NAMED
from metalora.meta.seeds import random_state
from metalora.meta.shards import Shard, beginning, join, split
from metalora.meta.stacked_steps import TASKS_WITH_STATE
from metalora.meta.steps import check_finite
from metalora.meta.task_optimizer import TaskOptimizer
from metalora.meta.training import Callback, Training, described

_FORMAT = "metalora training 4"
_EARLIER: dict[str, dict[str, Any]] = {  # and the values that these did not have
    "metalora training 2": {"steps_in_epoch": 0, "shards": [], "stopping": False},
    "metalora training 3": {"stopping": False},
}
_VALUES = {
    "training": dict,
    "layers": dict,
    "steps_done": int,
    "steps_in_epoch": int,
    "next_epoch": int,
    "kept_epoch": int,
    "stopping": bool,
    "history": list,
    "scaler": dict,
    "callbacks": list,
    "shards": list,
}
_ADAM = ("step", "exp_avg", "exp_avg_sq")  # what metalora's Adam and AdamW keep of each parameter
_WHAT_TO_DO = "name another path, or delete the file"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit the training, or could not be written."""


class Checkpoint(Callback):
    """Saves a training at its start and after every epoch, and resumes from the file if it exists.

    The file is safetensors with JSON metadata; nothing is ever unpickled. Each save replaces the
    file in one step (see `metalora._files.replacing`), so a complete one is always there. Needs the
    package safetensors. Must be the last of the callbacks, as it saves their state too.

    A training resumes only from a file of its own. The file must agree in the config, the kind of
    training with its settings, loss and forward, the model's initial weights (every byte of the
    parameters and buffers), which of them are trained, the adapted layers, and the loaders of data
    and validation: `RoundLoader.identity` gives the settings and a digest of the data, that of
    large tensors from a sample. So seed whatever makes the initial weights. Functions are compared
    by name alone. Initial adapters and heads are not compared if the file was written on another
    kind of device, where torch draws other numbers. The data of a loader without ``identity()`` are
    not compared either; a warning says so on resuming.

    Resumed within an epoch, the loader is run from the beginning of that epoch up to the place, so
    its batches must be the same in every run.

    Of several processes the first writes the file, and all read it, so the folder must be one that
    all see. With ``parallel="tasks"`` each process writes its own tasks into a file beside it,
    which the file names with its checksum; any number of processes can resume from them.

    Args:
        path: the file.
        resume: whether to resume from it; if not, a file that exists is an error.
        min_seconds: save only so long after the start or the last save. 0 saves at the start too,
            and whenever there is occasion. Of several processes the first one's clock decides.
        every_steps: save within epochs too, after each so many steps of the training; 1 together
            with ``min_seconds`` saves at equal intervals of time. None saves after epochs only.

    Raises:
        ImportError: if safetensors is not installed.
        TypeError, ValueError: if ``min_seconds`` is negative, or ``every_steps`` no count.
        CheckpointError: at the start, if the file is damaged or of another training; or at the
            start or at a save, if the file could not be written. The file is then as before. Raised
            in all processes, whichever fails.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        resume: bool = True,
        min_seconds: float = 0.0,
        every_steps: int | None = None,
    ) -> None:
        safetensors_torch("Checkpoint")
        self.path, self.resume = Path(path), resume
        self.min_seconds = check_nonnegative("Checkpoint", "min_seconds", min_seconds)
        if every_steps is not None:
            every_steps = check_count("Checkpoint", "every_steps", every_steps)
        self.every_steps = every_steps
        self._identity: dict[str, Any] = {}

    def on_start(self, training: Training) -> None:
        """Resumes from the file, or makes it."""
        self._saved = time.monotonic()
        if training.callbacks[-1] is not self:
            raise ValueError(
                "Checkpoint: must be the last of the callbacks, as it saves the others"
            )
        (exists,) = training.distribution.broadcast([self.path.exists()], training.device)
        if exists and not self.resume:
            raise CheckpointError(
                f"Checkpoint: {self.path} exists; go on with resume=True or name another file"
            )
        self._identity = training.identity()
        if not exists:
            if self.min_seconds == 0:
                self._save(training)
            return
        with _in_all_processes(training):
            if training.distribution.rank == 0:
                remove_partials(self.path)
            try:
                restore = _checked(self.path, training, self._identity)
            except CheckpointError:
                raise
            except Exception as error:  # a forged file can end in any exception
                raise _damaged(self.path, error) from error
        restore()
        if training.steps_done and isinstance(self._identity["rounds"], str):
            warn_user(
                f"Checkpoint: went on from {self.path} without comparing the data, for "
                f"{self._identity['rounds']} has no identity()"
            )

    def on_step(self, training: Training, loss: Tensor) -> None:
        """Saves within an epoch, if that is wanted and due."""
        if self.every_steps is None or training.steps_done % self.every_steps:
            return
        if training.steps_in_epoch < training.steps_per_epoch and self._is_due(training):
            mean = float(torch.stack(training.losses).mean())
            check_finite(mean, f"the mean loss of epoch {training.next_epoch}", training.config)
            if training.distribution.parallel is None:
                training.random_state = random_state(training.device)
            self._save(training)

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Saves, unless that was less than ``min_seconds`` ago."""
        if self._is_due(training):
            training.random_state = {}
            self._save(training)

    def _is_due(self, training: Training) -> bool:
        due = time.monotonic() - self._saved >= self.min_seconds
        if self.min_seconds > 0:
            due = bool(training.distribution.broadcast([due], training.device)[0])
        return due

    def _save(self, training: Training) -> None:
        tensors, values = _collect(training, self._identity)
        if training.distribution.by_task:
            tensors, own = split(training, tensors)
            values["shards"] = self._save_shards(training, own)
        with _in_all_processes(training):
            if training.distribution.rank == 0:
                write(self.path, tensors, values)
                _remove_shards(self.path, values["shards"])
        self._saved = time.monotonic()

    def _save_shards(self, training: Training, own: dict[str, Tensor]) -> list[dict[str, Any]]:
        """Writes this process's tasks beside the file; what there is of all processes."""
        processes = training.distribution
        place = f"{training.next_epoch}.{training.steps_in_epoch}"
        number = f"{processes.rank}-of-{processes.world_size}"
        name = f"{self.path.name}.{place}.{number}"
        entry: dict[str, Any] = {"file": name, "tasks": processes.tasks}
        with _in_all_processes(training):
            if processes.tasks:
                data = write(self.path.with_name(name), own, {"tasks": processes.tasks})
                entry["sha256"] = hashlib.sha256(data).hexdigest()
        entries = map(json.loads, processes.gather_text(json.dumps(entry), training.device))
        return [found for found in entries if found["tasks"]]


def remove_checkpoint(path: str | Path) -> None:
    """Removes what a `Checkpoint` of this path wrote, if there is anything."""
    path = Path(path)
    path.unlink(missing_ok=True)
    if path.parent.is_dir():
        _remove_shards(path, [])


def _remove_shards(path: Path, kept: list[dict[str, Any]]) -> None:
    """Removes those of earlier saves, and of saves that were interrupted."""
    name = re.escape(path.name)
    form = re.compile(rf"\.?{name}\.\d+\.\d+\.\d+-of-\d+(\..*\.partial)?")
    names = {shard["file"] for shard in kept}
    for found in path.parent.iterdir():
        if form.fullmatch(found.name) and found.name not in names:
            found.unlink(missing_ok=True)


@contextlib.contextmanager
def _in_all_processes(training: Training) -> Iterator[None]:
    """Raises in all processes what is raised inside in one."""
    error: CheckpointError | None = None
    try:
        yield
    except CheckpointError as raised:
        error = raised
    told = training.distribution.gather_text(str(error or ""), training.device)
    if error is not None:
        raise error
    for text in told:
        if text:
            raise CheckpointError(text)


def write(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> bytes:
    """Writes tensors and JSON values to ``path``, whole or not at all.

    Returns:
        What the file holds.

    Raises:
        CheckpointError: if that fails; an older file is then still there.
    """
    # Copies, as some tensors share memory, which safetensors refuses.
    kept = {
        name: torch.empty(t.shape, dtype=t.dtype).copy_(t.detach()) for name, t in tensors.items()
    }
    text = json.dumps({"format": _FORMAT, **values})
    metadata = {"metalora": text, "sha256": _digest(kept, text)}
    data = safetensors_torch("Checkpoint").save(kept, metadata=metadata)
    try:
        with replacing(path) as file:
            file.write(data)
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint: {path} could not be written ({error}); what was there is unchanged"
        ) from error
    return data


def read(path: Path, data: bytes | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write` wrote.

    Args:
        path: the file.
        data: what it holds, if that has been read already.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    try:
        data = path.read_bytes() if data is None else data
        tensors, metadata = parse_tensors(data, "Checkpoint")
        if "metalora" not in metadata:
            raise CheckpointError(f"Checkpoint: {path} is no checkpoint of metalora")
        if _digest(tensors, metadata["metalora"]) != metadata.get("sha256"):
            raise CheckpointError(f"Checkpoint: {path} is damaged: its checksum does not match")
        values = json.loads(metadata["metalora"])
    except CheckpointError:
        raise
    except Exception as error:
        raise _damaged(path, error) from error
    got = values.get("format") if isinstance(values, dict) else values
    if isinstance(got, str) and got in _EARLIER:
        values = {**values, **_EARLIER[got]}
    elif got != _FORMAT:
        raise CheckpointError(
            f"Checkpoint: {path} must have the format {_FORMAT!r}, got {short(got)}; {_WHAT_TO_DO}"
        )
    return tensors, values


def _damaged(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"Checkpoint: {path} is damaged or no checkpoint: {first_line(error)}")


def _collect(
    training: Training, identity: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"model.{name}": t for name, t in training.model.state_dict().items()}
    for number, state in training.step.optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{key}"] = value
    if training.steps_in_epoch:
        tensors["losses"] = torch.stack(training.losses)
        for name, state in training.random_state.items():
            tensors[f"random.{name}"] = state
    callbacks = []
    for number, callback in enumerate(training.callbacks):
        own, values = callback.state()
        tensors.update({f"callback.{number}.{name}": t for name, t in own.items()})
        callbacks.append({"kind": type(callback).__name__, "values": values})
    return tensors, {
        "training": identity,
        "layers": _layers(training),
        "steps_done": training.steps_done,
        "steps_in_epoch": training.steps_in_epoch,
        "next_epoch": training.next_epoch,
        "kept_epoch": training.kept_epoch,
        "stopping": bool(training.stopping),
        "history": training.history,
        "scaler": training.step.scaler.state_dict(),
        "callbacks": callbacks,
        "shards": [],
    }


def _checked(path: Path, training: Training, identity: dict[str, Any]) -> Callable[[], None]:
    """Checks everything, so that a file that does not fit changes nothing; what then restores."""
    tensors, values = read(path)
    _check_complete(path, values)
    saved = values["training"]
    if saved.get("device") != identity["device"]:
        saved = {**saved, **{name: identity[name] for name in ("device", "initial_adapters")}}
    if values["shards"] or training.distribution.by_task:
        _check_same(path, "the training", saved, identity)
        tensors |= join(training, _read_shards(path, values["shards"]))
    model = beginning("model.", tensors)
    _check_same(path, "the model", shapes_of(model), shapes_of(training.model.state_dict()))
    _check_same(path, "the adapters", values["layers"], _layers(training))
    _check_same(path, "the training", saved, identity)
    kinds = [callback["kind"] for callback in values["callbacks"]]
    _check_same(path, "callbacks", kinds, [type(c).__name__ for c in training.callbacks])
    losses, random = _check_progress(path, tensors, values, training)
    scaler = training.step.scaler
    _check_scaler(path, values["scaler"], scaler.state_dict())
    optimizer = training.step.optimizer
    state = _optimizer_state(path, beginning("optimizer.", tensors), optimizer)
    device = training.device
    for place, callback in enumerate(training.callbacks):
        own = {k: t.to(device) for k, t in beginning(f"callback.{place}.", tensors).items()}
        try:
            callback.load_state(own, values["callbacks"][place]["values"])
        except Exception as error:
            raise CheckpointError(
                f"Checkpoint: {path} does not fit {kinds[place]}: {first_line(error)}"
            ) from error

    def restore() -> None:
        if values["scaler"]:
            scaler.load_state_dict(values["scaler"])
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        training.model.load_state_dict(model)
        training.steps_done, training.next_epoch = values["steps_done"], values["next_epoch"]
        training.kept_epoch, training.stopping = values["kept_epoch"], values["stopping"]
        training.history.extend(values["history"])
        training.steps_in_epoch = values["steps_in_epoch"]
        training.losses, training.random_state = losses, random

    return restore


def _read_shards(path: Path, entries: list[Any]) -> list[Shard]:
    """The tasks and tensors of every shard.

    Raises:
        CheckpointError: if one is missing, damaged, or of another save.
    """
    found: list[Shard] = []
    for entry in entries:
        shard = path.with_name(Path(entry["file"]).name)
        if not shard.exists():
            raise CheckpointError(
                f"Checkpoint: {shard} is missing, which {path} needs for tasks {entry['tasks']}; "
                "all processes must see one folder"
            )
        data = shard.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise CheckpointError(f"Checkpoint: {shard} is damaged: its checksum does not match")
        tensors, values = read(shard, data)
        found.append((values["tasks"], tensors))
    return found


def _layers(training: Training) -> dict[str, str]:
    """Of the adapted layers what the shapes do not tell, such as alpha and dropout."""
    return {name: described(layer) for name, layer in adapted_layers(training.model).items()}


def _check_complete(path: Path, values: dict[str, Any]) -> None:
    wanted = [(key, values.get(key), kind) for key, kind in _VALUES.items()]
    callbacks = values.get("callbacks")
    for callback in callbacks if isinstance(callbacks, list) else ():
        own = callback if isinstance(callback, dict) else {}
        wanted += [("kind", own.get("kind"), str), ("values", own.get("values"), dict)]
    for key, value, kind in wanted:
        if type(value) is not kind:  # an int that is no bool
            raise CheckpointError(
                f"Checkpoint: {path} must hold {key!r}, a {kind.__name__}, got {short(value)}"
            )


def _check_same(path: Path, what: str, saved: Any, wanted: Any) -> None:
    found = list(differences("", saved, wanted))
    if found:
        raise CheckpointError(
            f"Checkpoint: {path} does not fit {what}: {first_of(found, 3)}; {_WHAT_TO_DO}"
        )


def _check_progress(
    path: Path, tensors: dict[str, Tensor], values: dict[str, Any], training: Training
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Refuses counters and a history that this training cannot have written.

    Returns:
        The losses of the epoch's steps so far, and the state of the generators.
    """
    done, history, in_epoch = values["next_epoch"], values["history"], values["steps_in_epoch"]
    steps = training.steps_per_epoch if done < training.config.epochs else 1
    losses = tensors.get("losses", torch.zeros(0))
    kinds = {"cpu", training.device.type}  # of another kind of device there is no generator here
    random = {k: t for k, t in beginning("random.", tensors).items() if k in kinds}
    wrong = None
    if not 0 <= done <= training.config.epochs:
        wrong = "next_epoch", done
    elif not 0 <= values["steps_done"] < 2**63:
        wrong = "steps_done", values["steps_done"]
    elif not 0 <= in_epoch < steps:
        wrong = "steps_in_epoch", in_epoch
    elif losses.shape != (in_epoch,) or not losses.is_floating_point():
        wrong = "losses", list(losses.shape)
    elif not -1 <= values["kept_epoch"] < max(done, 1):
        wrong = "kept_epoch", values["kept_epoch"]
    elif len(history) != done:
        wrong = "history", history
    for epoch, record in enumerate(history):
        own = record if isinstance(record, dict) else {}
        keys = ["loss", "lr", *(["validation"] if training.validates(epoch) else [])]
        numbers = [own.get(key) for key in keys]
        right = own.get("epoch") == epoch and all(map(_is_number, numbers))
        if not right or ("validation" in own) != ("validation" in keys):
            wrong = wrong or ("history", record)
    if wrong:
        raise CheckpointError(
            f"Checkpoint: {path} is damaged: {wrong[0]} cannot be {short(wrong[1])} in a training "
            f"of {training.config.epochs} epochs with {done} done"
        )
    for name, state in random.items():
        torch.Generator(name).set_state(state)  # raises if it is none
    return list(losses.to(training.device).unbind()), random


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _check_scaler(path: Path, saved: dict[str, Any], own: dict[str, Any]) -> None:
    """Refuses the state of another gradient scaler; only the scale and its counter may differ."""
    largest = {"scale": 3e38, "_growth_tracker": own.get("growth_interval", 0)}
    for key in {**saved, **own}:
        value: Any = saved.get(key, ABSENT)
        right = type(value) is type(own.get(key))
        if right and key in largest:
            right = 0 <= value <= largest[key]
        elif right:
            right = value == own[key]
        if not right:
            raise CheckpointError(
                f"Checkpoint: {path} does not fit the gradient scaler: {key} {short(value)}, here "
                f"{short(own.get(key, ABSENT))}"
            )


def _optimizer_state(
    path: Path, found: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The state by the parameter's number; refuses what the optimiser cannot have written."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kind = type(optimizer.inner if isinstance(optimizer, TaskOptimizer) else optimizer)
    known: tuple[str, ...] | None = _ADAM if kind in NAMED.values() else None
    if kind is torch.optim.SGD:
        known = ("momentum_buffer",) if optimizer.param_groups[0]["momentum"] else ()
    by_number: dict[str, dict[str, Tensor]] = {}
    for name, tensor in found.items():
        prefix, _, key = name.partition(".")
        by_number.setdefault(prefix, {})[key] = tensor
    state = {}
    for number, parameter in enumerate(parameters):
        own = by_number.pop(str(number), {})
        apart = isinstance(optimizer, TaskOptimizer) and TASKS_WITH_STATE in own
        keys = tuple(own) if known is None else known
        wanted = [*keys, TASKS_WITH_STATE] if apart else keys
        for key in {**own, **dict.fromkeys(wanted)} if own else ():
            fits = key in wanted and key in own
            if fits and known is not None:
                fits = _fits(key, own[key], parameter, apart)
            elif fits:
                fits = own[key].shape in ((), parameter.shape[:1], parameter.shape)
            if not fits:
                got = shapes_of(own).get(key, "nothing")
                raise CheckpointError(
                    f"Checkpoint: {path} has optimizer state {short(f'{number}.{key}')}: {got}, "
                    f"wanted {', '.join(known or ()) or 'none'} of shape "
                    f"{list(parameter.shape)}"
                )
        if own:
            state[number] = {key: _laid_out(value, parameter) for key, value in own.items()}
    if by_number:
        prefix, own = next(iter(by_number.items()))
        name = short(f"{prefix}.{next(iter(own))}")
        raise CheckpointError(
            f"Checkpoint: {path} has optimizer state {name}, but there are {len(parameters)} "
            "parameters"
        )
    return state


def _laid_out(value: Tensor, parameter: Tensor) -> Tensor:
    """The value in the parameter's memory format, which a file does not keep.

    Fused optimisers step by the order in memory.
    """
    if value.shape != parameter.shape or parameter.is_contiguous():
        return value
    return torch.empty_like(parameter, dtype=value.dtype, device=value.device).copy_(value)


def _fits(key: str, state: Tensor, parameter: Tensor, apart: bool) -> bool:
    """Whether it can be such a state; ``apart``: its tasks were not all stepped alike."""
    if key == TASKS_WITH_STATE:
        return state.dtype == torch.bool and state.shape == parameter.shape[:1]
    if key == "step":
        wanted = parameter.shape[:1] if apart else ()
        counts = state.shape == wanted and state.is_floating_point()
        return counts and bool(((state >= 0) & (state < math.inf)).all())
    return state.dtype == parameter.dtype and state.shape == parameter.shape


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    return hashlib.sha256((text + digest_of_tensors(tensors)).encode()).hexdigest()
