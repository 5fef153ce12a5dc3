"""Tells errors that the user can put right from bugs."""

from __future__ import annotations

import re

# torch has no class of its own for these: an allocation failed, or the size itself overflowed.
_TOO_LARGE = re.compile(
    r"not enough memory|(can't|cannot) allocate memory|out of memory|overflow", re.IGNORECASE
)


def too_large(error: BaseException | None) -> bool:
    """Whether an error says that something is too large for this memory, or for any."""
    if isinstance(error, (MemoryError, OverflowError)):
        return True
    return isinstance(error, RuntimeError) and _TOO_LARGE.search(str(error)) is not None
