"""What the experiments with PyTorch models share: devices, logs, weights, errors."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from experiments.lib.errors import RunError
from experiments.lib.runs import RunFolder
from metalora._files import replacing
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    Result,
    RoundLoader,
    TrainConfig,
    Training,
    last_layer_ml,
    lora_ml,
    reptile,
    standard,
)

Value = TypeVar("Value")

# Of standard retraining's batches, see `RoundLoader`: a batch of one task is a step.
STANDARD_ORDERS = ("pooled", "interleaved", "blocked")
SHARED_HEADS = ("mean", "refit")


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


def known(value: Value | None) -> Value:
    """A setting whose default has been filled in."""
    assert value is not None
    return value


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
    """Writes the model's state as safetensors; whatever interrupts it, never a part."""
    from safetensors.torch import save

    data = save(model.state_dict())
    with replacing(path) as file:
        file.write(data)


def load_weights(model: nn.Module, path: Path) -> None:
    """Gives the model what `save_weights` wrote for it.

    Raises:
        RunError: the file is missing, damaged, or another model's.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        model.load_state_dict(load_file(path))
    except (OSError, SafetensorError, RuntimeError):
        raise RunError(f"--resume: {path} is missing or damaged; start a new run") from None


def with_tasks(settings: Any) -> dict[str, Any]:
    """Fields of a `TrainConfig` for the methods whose tasks have adapters or heads of their own."""
    names = ("step_per", "adapter_lr", "adapter_weight_decay", "adapter_steps")
    return {name: getattr(settings, name) for name in names}


def retrain(
    method: str,
    model: nn.Module,
    rounds: RoundLoader,
    config: TrainConfig,
    adapter: LoRAConfig | None,
    heads: Sequence[str],
    inner: Mapping[str, Any],
    **common: Any,
) -> Result:
    """One of the four retrainings by its name, in place.

    Args:
        adapter: of lora-ml, for which it must be given.
        heads: of last-layer-ml.
        inner: keywords of reptile alone.
        common: keywords of all four.
    """
    if method == "lora-ml":
        return lora_ml(model, rounds, config, known(adapter), **common)
    if method == "last-layer-ml":
        return last_layer_ml(model, rounds, config, heads, **common)
    if method == "standard":
        return standard(model, rounds, config, **common)
    return reptile(model, rounds, config, **inner, **common)
