"""Exchanging two folders in one step, on systems that can do that."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux


def exchange(first: Path, second: Path) -> bool:
    """Gives each folder the other's name, both at once; False, and no change, if that fails.

    Linux can on most of its own file systems; network file systems mostly cannot.
    """
    if sys.platform != "linux":
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except AttributeError:  # a C library that does not know it
        return False
    names = os.fsencode(first), os.fsencode(second)
    failed = renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    return not failed
