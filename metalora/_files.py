"""Writing files whole or not at all, whatever ends the process, and reading tensors from them."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import itertools
import json
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from metalora._optional import require

_HERE = hashlib.blake2b(platform.node().encode(), digest_size=4).hexdigest()
_numbers = itertools.count()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Opens a new file, which takes the place of ``path`` at the end if all went well.

    A reader sees the old file or the new one, never a part. The new file is on the disk before it
    takes the name, and the folder's entry before this returns, so a power failure leaves one of
    the two as well. Missing parent folders are made. Partial files that killed processes left for
    the same ``path`` are removed.

    Raises:
        OSError: if the file could not be written; ``path`` is then as before, and nothing is left
            beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(path)
    partial = partial_beside(path)
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    sync_path(path.parent)


def cache_folder() -> Path:
    """Returns ``$METALORA_CACHE``, or ``metalora`` in the user's cache folder.

    Raises:
        RuntimeError: if neither that nor XDG_CACHE_HOME is set and the user has no home folder.
    """
    if folder := os.environ.get("METALORA_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metalora"


def read_tensors(path: Path, function: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the metadata of a safetensors file; nothing is ever unpickled.

    The file is read at once: mapped into memory, it would end the process if it is cut short.

    Raises:
        ImportError: if safetensors is not installed; the message begins with ``function``.
        Exception: of any kind, if the file cannot be read or is damaged.
    """
    return parse_tensors(path.read_bytes(), function)


def parse_tensors(data: bytes, function: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `read_tensors` returns, of the bytes of a file."""
    safetensors = safetensors_torch(function)
    tensors = safetensors.load(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return dict(sorted(tensors.items())), header.get("__metadata__", {})


def safetensors_torch(function: str) -> Any:
    """The module safetensors.torch, for ``function``; ImportError if it is not installed."""
    require("safetensors", function)
    return importlib.import_module("safetensors.torch")


def partial_beside(path: Path) -> Path:
    """A hidden name beside ``path``, not used so far, for its replacement."""
    return path.with_name(f".{path.name}.{_HERE}.{os.getpid()}.{next(_numbers)}.partial")


def remove_partials(path: Path) -> None:
    """Removes what ended processes of this machine left under `partial_beside`.

    Files of other machines, which may share the folder, are left alone.
    """
    start, end = f".{path.name}.{_HERE}.", ".partial"
    with contextlib.suppress(OSError):
        for found in list(path.parent.iterdir()):
            if not (found.name.startswith(start) and found.name.endswith(end)):
                continue
            pid, _, number = found.name[len(start) : -len(end)].partition(".")
            if not (pid.isascii() and pid.isdecimal() and number.isdecimal()) or _runs(int(pid)):
                continue
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            else:
                found.unlink(missing_ok=True)


def sync_path(path: Path) -> None:
    """Has the system write a file, or a folder's entries, to the disk.

    Windows and some file systems cannot do that, and this then does nothing.
    """
    with contextlib.suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _runs(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would be Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's, or no number of a process
        return True
    return True
