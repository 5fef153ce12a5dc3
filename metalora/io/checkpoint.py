"""Interrupting a training, and going on in the same bits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from metalora.adapters import adapted_layers
from metalora.meta import Callback, Training

_FORMAT = "metalora training 1"
_VALUES = {
    "training": dict,
    "layers": dict,
    "steps_done": int,
    "next_epoch": int,
    "kept_epoch": int,
    "history": list,
    "scaler": dict,
    "callbacks": list,
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, does not fit the training, or could not be written."""


class Checkpoint(Callback):
    """Saves a training after every epoch, and goes on from the file if it is there.

    The file is safetensors, its metadata JSON; nothing is ever unpickled. It is written beside its
    place and renamed, so that at any moment the last complete one is there. Needs the package
    safetensors. Must be the last of the callbacks, whose state it saves too.

    Args:
        path: the file.
        resume: whether to go on from it; without, a file that exists is an error.

    Raises:
        ImportError: if safetensors is not installed.
        CheckpointError: at the start of the training, if the file is damaged or of another
            training; after an epoch, if it could not be written. The file is then as before.
    """

    def __init__(self, path: str | Path, *, resume: bool = True) -> None:
        _safetensors()
        self.path, self.resume = Path(path), resume

    def on_start(self, training: Training) -> None:
        """Goes on from the file, if there is one."""
        if training.callbacks[-1] is not self:
            raise ValueError(
                "Checkpoint: must be the last of the callbacks, as it saves the others"
            )
        if not self.path.exists():
            return
        if not self.resume:
            raise CheckpointError(
                f"Checkpoint: {self.path} exists; go on with resume=True or name another file"
            )
        _restore(self.path, training)

    def on_epoch(self, training: Training, record: dict[str, Any]) -> None:
        """Saves."""
        write(self.path, *_collect(training))


def write(path: Path, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    """Writes tensors and JSON values to ``path``, whole or not at all.

    Raises:
        CheckpointError: if that fails; an older file is then still there.
    """
    kept = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    text = json.dumps({"format": _FORMAT, **values})
    data = _safetensors().torch.save(
        kept, metadata={"metalora": text, "sha256": _digest(kept, text)}
    )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"Checkpoint: {path} could not be written ({error}); what was there is unchanged"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads what `write` wrote.

    Raises:
        CheckpointError: if the file is damaged or something else.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if "metalora" not in metadata:
                raise CheckpointError(f"Checkpoint: {path} is no checkpoint of metalora")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if _digest(tensors, metadata["metalora"]) != metadata.get("sha256"):
            raise CheckpointError(f"Checkpoint: {path} is damaged: its checksum does not match")
        values = json.loads(metadata["metalora"])
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"Checkpoint: {path} is damaged or no checkpoint: {error}") from error
    got = values.get("format") if isinstance(values, dict) else values
    if got != _FORMAT:
        raise CheckpointError(f"Checkpoint: {path} must have the format {_FORMAT!r}, got {got!r}")
    return tensors, values


def _collect(training: Training) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f"model.{name}": t for name, t in training.model.state_dict().items()}
    for number, state in _optimizer(training).state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{key}"] = value
    callbacks = []
    for number, callback in enumerate(training.callbacks):
        own, values = callback.state()
        tensors.update({f"callback.{number}.{name}": t for name, t in own.items()})
        callbacks.append({"kind": type(callback).__name__, "values": values})
    return tensors, {
        "training": _identity(training),
        "layers": _layers(training),
        "steps_done": training.steps_done,
        "next_epoch": training.next_epoch,
        "kept_epoch": training.kept_epoch,
        "history": training.history,
        "scaler": training.step.scaler.state_dict(),
        "callbacks": callbacks,
    }


def _restore(path: Path, training: Training) -> None:
    """Checks everything first, so that a file that does not fit changes nothing."""
    tensors, values = read(path)
    _check_complete(path, values)
    _check_same(path, "the training", values["training"], _identity(training))
    kinds = [callback["kind"] for callback in values["callbacks"]]
    _check_same(path, "callbacks", kinds, [type(c).__name__ for c in training.callbacks])
    model = _part(tensors, "model.")
    _check_same(path, "the model", _shapes(model), _shapes(training.model.state_dict()))
    _check_same(path, "the adapters", values["layers"], _layers(training))
    optimizer = _optimizer(training)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _part(tensors, "optimizer.").items():
        number, _, key = name.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise CheckpointError(
                f"Checkpoint: {path} has optimizer state {name!r}, but there are "
                f"{len(parameters)} parameters"
            )
        shape = list(parameters[int(number)].shape)
        wanted = [[], shape[:1], shape]  # shape[:1]: one number per task, see TaskOptimizer
        if list(tensor.shape) not in wanted:
            raise CheckpointError(
                f"Checkpoint: {path} has optimizer state {name!r} of shape {list(tensor.shape)}, "
                f"wanted {shape}"
            )
        state.setdefault(int(number), {})[key] = tensor
    device = parameters[0].device
    for place, callback in enumerate(training.callbacks):
        own = {k: t.to(device) for k, t in _part(tensors, f"callback.{place}.").items()}
        try:
            callback.load_state(own, values["callbacks"][place]["values"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"Checkpoint: {path} does not fit {kinds[place]}: {error}"
            ) from error

    training.model.load_state_dict(model)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    if values["scaler"]:
        training.step.scaler.load_state_dict(values["scaler"])
    training.steps_done, training.next_epoch = values["steps_done"], values["next_epoch"]
    training.kept_epoch = values["kept_epoch"]
    training.history.extend(values["history"])


def _identity(training: Training) -> dict[str, Any]:
    """What must be equal for one training to go on where another stopped."""
    return {
        **asdict(training.config),
        "step": type(training.step).__name__,
        **training.step.settings,
        "steps_per_epoch": training.steps_per_epoch,
    }


def _layers(training: Training) -> dict[str, str]:
    """What the weights' shapes don't tell of the adapted layers, such as alpha and dropout."""
    return {name: repr(layer) for name, layer in adapted_layers(training.model).items()}


def _optimizer(training: Training) -> torch.optim.Optimizer:
    return training.step.optimizer


def _check_complete(path: Path, values: dict[str, Any]) -> None:
    wanted = [(key, values.get(key), kind) for key, kind in _VALUES.items()]
    for callback in values.get("callbacks") or ():
        own = callback if isinstance(callback, dict) else {}
        wanted += [("kind", own.get("kind"), str), ("values", own.get("values"), dict)]
    for key, value, kind in wanted:
        if not isinstance(value, kind):
            raise CheckpointError(
                f"Checkpoint: {path} must hold {key!r}, a {kind.__name__}, got {value!r}"
            )


def _check_same(path: Path, what: str, saved: Any, wanted: Any) -> None:
    if saved == wanted:
        return
    detail = f"{saved!r} instead of {wanted!r}"
    if isinstance(saved, dict):
        names = [n for n in {**wanted, **saved} if saved.get(n) != wanted.get(n)]
        detail = f"{names[0]} is {saved.get(names[0])!r} instead of {wanted.get(names[0])!r}"
    raise CheckpointError(f"Checkpoint: {path} does not fit {what}: {detail}")


def _shapes(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "Checkpoint: needs the package safetensors; pip install safetensors"
        ) from None
    return safetensors


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
