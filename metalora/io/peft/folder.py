"""Folders that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BASE = "base"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor."""


class PeftFolderError(ValueError):
    """An adapter folder that cannot be read, does not fit the model, or could not be written."""


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything but an export that may be replaced."""
    if not folder.name or (folder.exists() and not folder.is_dir()):
        raise PeftFolderError(f"export_peft: {folder} must be a folder, or not be there yet")
    entries = sorted(folder.iterdir()) if folder.exists() else []
    if entries and not overwrite:
        raise PeftFolderError(
            f"export_peft: {folder} is not empty; name another folder, or say overwrite=True"
        )
    for entry in entries:
        if not (entry / ("config.json" if entry.name == BASE else CONFIG)).is_file():
            raise PeftFolderError(
                f"export_peft: {folder} holds {entry.name!r}, which is no part of an export; "
                "name another folder"
            )


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of ``folder`` at the end, if all went well.

    Raises:
        PeftFolderError: if it could not be written. Whatever goes wrong, ``folder`` is as before.
    """
    from safetensors import SafetensorError

    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    try:
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    except (OSError, SafetensorError) as error:
        raise PeftFolderError(
            f"export_peft: {folder} could not be written ({error}); what was there is unchanged"
        ) from error
    finally:
        if old.exists() and not folder.exists():
            old.replace(folder)
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
