"""Writing folders whole or not at all, whatever ends the process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from metalora._files import partial_beside, remove_partials, sync_path
from metalora.io.exchange import exchange

BASE = "base"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
CARD = "README.md"
PREFIX = "base_model.model."
"""What PEFT puts before the name of every tensor."""
SAVED_BY_TYPE = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT saves whole for a type of task."""


class PeftFolderError(ValueError):
    """An adapter folder that cannot be read, does not fit the model, or could not be written."""


def check_target(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything but an export that may be replaced."""
    if not folder.name or (folder.exists() and not folder.is_dir()):
        raise PeftFolderError(f"export_peft: {folder} must be a folder, or not be there yet")
    restore(folder)
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

    The two change places in one step, so that a process killed at any moment leaves the old or the
    new folder there. On a file system without that step the old one is moved aside first; if the
    process is killed before the new one is moved in, `restore` puts the old one back. Partial
    folders that killed processes left are removed.

    Raises:
        PeftFolderError: if it could not be written. Whatever goes wrong, ``folder`` is as before.
    """
    from safetensors import SafetensorError

    remove_partials(folder)
    partial = partial_beside(folder)
    aside = folder.with_name(f".{folder.name}.{os.getpid()}{_ASIDE}")
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync_path(path)
        if not folder.exists():
            partial.replace(folder)
        elif not exchange(partial, folder):
            folder.replace(aside)
            partial.replace(folder)
        sync_path(folder.parent)
    except (OSError, SafetensorError) as error:
        raise PeftFolderError(
            f"export_peft: {folder} could not be written ({error}); what was there is unchanged"
        ) from error
    finally:
        restore(folder)
        shutil.rmtree(partial, ignore_errors=True)


_ASIDE = ".aside"


def restore(folder: Path) -> None:
    """Puts back what an export moved aside before it ended; where ``folder`` is there, removes it.

    Does nothing where nothing can be written, or another process was first.
    """
    for aside in folder.parent.glob(f".{escape(folder.name)}.*{_ASIDE}"):
        with suppress(OSError):
            if folder.exists():
                old = aside.replace(partial_beside(folder))  # or half of it might come back
                shutil.rmtree(old, ignore_errors=True)
            else:
                aside.replace(folder)
