"""A folder of token sequences, one file for each key, checked by checksum when they are read."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

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
            if file.metadata() == {"key": key, "sha256": _checksum(tensors)}:
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
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="turns-", suffix=".tmp", dir=folder)
        os.close(handle)
        temporary = Path(name)
        metadata = {"key": key, "sha256": _checksum(tensors)}
        save_file(dict(tensors), temporary, metadata=metadata)
        temporary.replace(_path(folder, key))
    except (OSError, SafetensorError) as error:
        print(
            f"note: the sequences are not kept: cannot write to {folder} ({error}); "
            f"set {FOLDER_VARIABLE} to another folder",
            file=sys.stderr,
        )
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _path(folder: Path, key: str) -> Path:
    return folder / f"turns-{key[:32]}.safetensors"


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
