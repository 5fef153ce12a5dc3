"""Errors that the user can put right, and how to tell them from bugs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from metalora._errors import DivergedError

INTERRUPTED = 130  # the shell's exit code for a process ended by Ctrl-C
# torch has no class of its own for these: an allocation failed, or the size itself overflowed.
# Other overflows, of numbers and of buffers, are bugs or divergence.
_TOO_LARGE = re.compile(
    r"not enough memory|(can't|cannot) allocate memory|out of memory"
    r"|storage size calculation overflowed|numel: integer multiplication overflow",
    re.IGNORECASE,
)
_TOO_LARGE_COUNT = re.compile(r"\bint(eger)?\b")  # a float's overflow is of a number, not of a size


class RunError(Exception):
    """Something the user can put right; the command line shows it as one line with exit code 2."""


class DataError(RunError):
    """Data or a model are missing or damaged; the message says where and what to do."""


def too_large(error: BaseException | None) -> bool:
    """Returns whether an error says that something does not fit this machine's memory, or any."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OverflowError):
        return _TOO_LARGE_COUNT.search(str(error)) is not None
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None


@contextlib.contextmanager
def divergence(unit: str, rates: str) -> Iterator[None]:
    """Turns the divergence of a training, which the user can put right, into a `RunError`.

    Args:
        unit: the unit of work, as in its run folder.
        rates: the flags of the rates to lower.
    """
    try:
        yield
    except DivergedError as error:
        raise RunError(f"{unit} diverged; lower {rates} ({error})") from error
