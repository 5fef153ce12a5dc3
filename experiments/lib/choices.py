"""What is chosen for each part of a run, by another run on validation tasks for instance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.lib.errors import RunError
from experiments.lib.manifest import read_manifest
from experiments.lib.runs import RunFolder


def finished_run(
    folder: Path, flag: str, experiment: str, data: Mapping[str, str]
) -> Mapping[str, Any]:
    """Returns the manifest of the run that something is taken from.

    Args:
        folder: the run's.
        flag: the option that names it.
        experiment: the experiment that it must be of.
        data: checksums of the data that it must have used, by name.

    Raises:
        RunError: it is another run, is not finished, or has used other data.
    """
    manifest = read_manifest(folder, flag, experiment)
    if manifest.get("status") != "completed":
        raise RunError(f"{flag}: the run in {folder} is not finished; go on with it first")
    for name, sha256 in data.items():
        if manifest["data"].get(name) != sha256:
            raise RunError(
                f"{flag}: the run in {folder} has used other data ({name}) than this one"
            )
    return manifest


def keep_choices(folder: RunFolder, flag: str, name: str, chosen: Mapping[str, Any]) -> None:
    """Notes in the manifest what was chosen; refuses a resumed run that had other choices.

    Args:
        folder: of the run that begins, or goes on.
        flag: the option that gives the choices, or names where they come from.
        name: of the note.
        chosen: by a text that says what for.

    Raises:
        RunError: the folder's run began with another choice.
    """
    before = folder.manifest.get("notes", {}).get(name, {})
    for what, value in before.items():
        if (now := chosen.get(what, value)) != value:
            raise RunError(
                f"{flag}: the {name} of {what} was {value} when this run began, and is {now} now; "
                "start a new run"
            )
    folder.note(**{name: {**before, **chosen}})
