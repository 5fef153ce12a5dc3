"""Activation checkpointing runs layers again in backward: with the tasks of their forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils import checkpoint

from metalora.nn.context import keep_tasks


def keep_tasks_in_checkpoints() -> None:
    """Adds the tasks to what `torch.utils.checkpoint` restores when it runs a function again.

    torch restores the random state and autocast there and has no place to register more, so its
    two ways to remember a function, with and without ``use_reentrant``, are wrapped. Functions
    without adapted layers run as before.
    """
    forward = checkpoint.CheckpointFunction.forward
    remember = checkpoint._CheckpointFrame.__init__

    def reentrant(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        return forward(ctx, keep_tasks(function), *args)

    def not_reentrant(frame: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        remember(frame, keep_tasks(function), *args, **kwargs)

    checkpoint.CheckpointFunction.forward = staticmethod(reentrant)  # type: ignore[method-assign]
    checkpoint._CheckpointFrame.__init__ = not_reentrant  # type: ignore[assignment, method-assign]
