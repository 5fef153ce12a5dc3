"""A lock that lets one process at a time work in a folder."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from pathlib import Path
from typing import IO

from experiments.lib.errors import RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"


class FolderLock:
    """Holds a folder for this process until `release`, or until the process ends in any way.

    The lock is the system's (flock) on the file ``.lock``, which stays behind and holds who took
    it last. Where the system or the folder's file system has no such locks, a note on stderr says
    so, and nothing keeps two processes apart.

    Raises:
        RunError: another holds it, in this process or in another; says which, if that is known.
        OSError: the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self._file: IO[bytes] = (folder / NAME).open("a+b", buffering=0)
        try:
            self._take(folder)
        except BaseException:
            self._file.close()
            raise
        with contextlib.suppress(OSError):  # on a full disk only the holder's name is missing
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {platform.node()}\n".encode())

    def _take(self, folder: Path) -> None:
        try:
            if fcntl is None:
                raise OSError("this system has no flock")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(200).decode(errors="replace").strip()
            raise RunError(
                f"{folder} is in use by {holder or 'another process'}; wait until that has ended, "
                "or choose another --out"
            ) from None
        except OSError as error:
            print(
                f"note: {folder} cannot be locked ({error.strerror or error}); "
                "do not start another run in it",
                file=sys.stderr,
            )

    def release(self) -> None:
        """Releases the folder; may be called more than once."""
        self._file.close()
