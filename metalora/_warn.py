"""Warnings that point at the user's own line."""

from __future__ import annotations

import inspect
import warnings

_BETWEEN = ("metalora", "torch", "contextlib")
"""What stands between a user's line and a warning: we, a layer's call, and decorators."""


def warn_user(message: str) -> None:
    """Warns about the line that called into metalora, from however deep inside it."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
