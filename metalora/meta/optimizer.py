"""The optimisers that a `TrainConfig` can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

NAMED: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


def make_optimizer(
    name: str, parameters: Sequence[Tensor], lr: float, weight_decay: float
) -> Optimizer:
    """The optimiser called ``name``, fused where torch can."""
    kind: Callable[..., Optimizer] = NAMED[name]
    options: dict[str, Any] = {"weight_decay": weight_decay, "fused": can_fuse(parameters)}
    return kind(parameters, lr=lr, **options)


def can_fuse(parameters: Iterable[Tensor]) -> bool:
    """Whether torch has a fused kernel of those optimisers for such parameters."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
