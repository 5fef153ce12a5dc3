"""The retrained models of other runs, for a run that only fine-tunes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib import units
from experiments.lib.errors import RunError
from experiments.lib.manifest import plain, read_manifest
from experiments.lib.retraining_settings import REFIT

FLAG = "--retrained"


class RetrainedModels:
    """The finished retrainings in run folders, which other processes may still be writing to.

    Args:
        folders: the runs'.
        experiment: the experiment that they must be of.
        settings: resolved settings of the run that wants the models.
        part_of: by field the methods and the like that read it; the others are for all.
        data: checksums of its data.

    Raises:
        RunError: a folder has no such run, or its files are damaged.
    """

    def __init__(
        self,
        folders: Sequence[Path],
        experiment: str,
        settings: Any,
        part_of: Mapping[str, Sequence[str]],
        data: Mapping[str, str],
    ):
        self._settings, self._part_of, self._data = settings, part_of, data
        self._runs = [
            (folder, read_manifest(folder, FLAG, experiment), units.finished(folder, FLAG))
            for folder in folders
        ]

    def run_with(self, method: str, unit: str) -> Path:
        """Returns the first folder that has a retraining.

        Args:
            method: the retraining's.
            unit: its name among the run's units of work.

        Raises:
            RunError: no folder has it, finished, as this run would do it.
        """
        problems = []
        for folder, manifest, done in self._runs:
            problem = next(self._differences(method, manifest), None)
            if unit not in done:
                problem = f"has not finished {unit!r}"
            if problem is None:
                return folder
            problems.append(f"{folder} {problem}")
        raise RunError(
            f"{FLAG}: {', '.join(problems)}; leave {method} out by --retrain, or trials by --seeds "
            "(--resume adds them later), or retrain anew"
        )

    def _differences(self, method: str, manifest: Mapping[str, Any]) -> Iterator[str]:
        """Yields what differs between a run's retraining by a method and this run's."""
        readers = {method, *([REFIT] if self._settings.refits(method, self._part_of) else [])}
        for field in dataclasses.fields(self._settings):
            free = field.metadata.get("run_only") or field.metadata.get("extends")
            free = free or field.name == "first_seed"  # a unit's name has its trial
            if free or readers.isdisjoint(self._part_of.get(field.name, readers)):
                continue
            was = manifest["settings"].get(field.name, plain(field.default))
            wanted = plain(getattr(self._settings, field.name))
            if was != wanted:
                yield f"retrained {method} with {field.name} {was!r}, not {wanted!r}"
        for name, sha256 in self._data.items():
            if name not in manifest["data"]:
                yield f"retrained {method} with no checksum of its data ({name})"
            elif manifest["data"][name] != sha256:
                yield f"retrained {method} on other data ({name})"
