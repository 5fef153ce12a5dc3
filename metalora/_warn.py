"""Warnings that point at the user's own line."""

from __future__ import annotations

import inspect
import warnings


def warn_user(message: str) -> None:
    """Warns about the line that called into metalora, from however deep inside it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and _is_ours(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_ours(module: str) -> bool:
    return module.partition(".")[0] == "metalora"
