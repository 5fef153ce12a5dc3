"""Errors that the user can put right, and how to tell them from bugs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from metalora._checks import DivergedError

INTERRUPTED = 130  # the shell's exit code for a process ended by Ctrl-C
# torch has no class of its own for these: an allocation failed, or the size itself overflowed.
_TOO_LARGE = re.compile(
    r"not enough memory|(can't|cannot) allocate memory|out of memory|overflow", re.IGNORECASE
)


class RunError(Exception):
    """Something the user can put right; the command line shows it as one line with exit code 2."""


class DataError(RunError):
    """Data or a model are missing or damaged; the message says where and what to do."""


def too_large(error: BaseException | None) -> bool:
    """Returns whether an error says that something does not fit this machine's memory, or any."""
    if isinstance(error, (MemoryError, OverflowError)):
        return True
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
    except (DivergedError, RuntimeError) as error:
        if "diverged" not in str(error) and not isinstance(error, DivergedError):
            raise
        raise RunError(f"{unit} diverged; lower {rates} ({error})") from error
