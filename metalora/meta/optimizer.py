"""The optimisers that a `TrainConfig` can name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from metalora._checks import SHORT
from metalora._warn import warn_user

NAMED: dict[str, type[Optimizer]] = {"adam": Adam, "adamw": AdamW, "sgd": SGD}


def make_optimizer(
    name: str,
    parameters: Sequence[Tensor] | Sequence[dict[str, Any]],
    lr: float,
    weight_decay: float,
    **settings: Any,
) -> Optimizer:
    """The optimiser called ``name`` of parameters, or of groups of them, fused where torch can."""
    groups = (p["params"] if isinstance(p, dict) else [p] for p in parameters)
    fused = can_fuse(p for group in groups for p in group)
    fused &= not settings.get("momentum")  # torch fuses that only if all begin in the same step
    kind: Callable[..., Optimizer] = NAMED[name]
    return kind(parameters, lr=lr, weight_decay=weight_decay, fused=fused, **settings)


def can_fuse(parameters: Iterable[Tensor]) -> bool:
    """Whether torch has a fused kernel of those optimisers for such parameters."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


def warn_of_short(function: str, parameters: Sequence[Tensor]) -> None:
    """Warns if parameters that will be trained are stored in 16 bits."""
    short = [p for p in parameters if p.dtype in SHORT]
    if short:
        warn_user(
            f"{function}: {len(short)} of {len(parameters)} trained parameters are stored in "
            f"{short[0].dtype}, where steps that are small beside a weight are rounded away; call "
            "model.float() first (or load the model with dtype=torch.float32), and compute in 16 "
            "bits under torch.autocast or with TrainConfig(precision='bf16')"
        )
