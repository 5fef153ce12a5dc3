"""Argument checks shared by every layer: one clear line: what was expected and what was passed."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any


class DivergedError(FloatingPointError):
    """A training whose loss is NaN or infinite."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x' or 'y'?"`` with the names nearest to ``name``, or ``""``."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    near = [by_lower[lower] for lower in found]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def check_positive(function: str, argument: str, value: Any) -> float:
    """Returns ``value`` as a float if it is a finite number above zero, else raises ValueError."""
    number = _finite_number(function, argument, value, "a finite number > 0")
    if not number > 0:
        raise ValueError(f"{function}: {argument} must be a finite number > 0, got {value!r}")
    return number


def check_nonnegative(function: str, argument: str, value: Any) -> float:
    """Returns ``value`` as a float if it is a finite number >= 0, else raises ValueError."""
    number = _finite_number(function, argument, value, "a finite number >= 0")
    if number < 0:
        raise ValueError(f"{function}: {argument} must be a finite number >= 0, got {value!r}")
    return number


def check_count(
    function: str, argument: str, value: Any, minimum: int = 1, maximum: int | None = None
) -> int:
    """Returns ``value`` if it is an int >= ``minimum`` and, unless None, <= ``maximum``.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{function}: {argument} must be an int >= {minimum}, got {type(value).__name__} "
            f"{value!r}"
        )
    if value < minimum:
        raise ValueError(f"{function}: {argument} must be an int >= {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{function}: {argument} must be an int <= {maximum}, got {value}")
    return value


def check_choice(function: str, argument: str, value: Any, choices: Iterable[str]) -> str:
    """Returns ``value`` if it is one of ``choices``, else raises ValueError naming the nearest."""
    choices = list(choices)
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{function}: {argument} must be one of {choices}, got {value!r}{hint}")
    return str(value)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _finite_number(function: str, argument: str, value: Any, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"{function}: {argument} must be {wanted}, got {type(value).__name__} {value!r}"
        )
    try:
        number = float(value)
    except OverflowError:  # an int beyond what a float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{function}: {argument} must be {wanted}, got {value!r}")
    return number
