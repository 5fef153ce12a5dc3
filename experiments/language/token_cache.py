"""A folder of token sequences, one file for each key, checked by checksum when they are read."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from metalora._files import replacing
from metalora.meta.identity import digest_of_tensors

FOLDER_VARIABLE = "METALORA_CACHE"


def default_folder() -> Path:
    """``$METALORA_CACHE``, or ``metalora`` in the user's cache folder."""
    if folder := os.environ.get(FOLDER_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metalora"


def read(folder: Path, key: str) -> dict[str, Tensor] | None:
    """What was written under a key; None if nothing was, or (with a note on stderr) damaged."""
    from safetensors import SafetensorError, safe_open

    path = _path(folder, key)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if file.metadata() == {"key": key, "sha256": digest_of_tensors(tensors)}:
                return tensors
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError):
        pass
    print(f"note: {path} is damaged; its sequences are made again", file=sys.stderr)
    return None


def write(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Stores tensors under a key: another process sees all of them or nothing.

    A folder that cannot be written to costs a note on stderr, no more.
    """
    from safetensors.torch import save

    data = save(dict(tensors), {"key": key, "sha256": digest_of_tensors(tensors)})
    try:
        with replacing(_path(folder, key)) as file:
            file.write(data)
    except OSError as error:
        print(
            f"note: the sequences are not kept: cannot write to {folder} ({error}); "
            f"set {FOLDER_VARIABLE} to another folder",
            file=sys.stderr,
        )


def _path(folder: Path, key: str) -> Path:
    return folder / f"turns-{key[:32]}.safetensors"
