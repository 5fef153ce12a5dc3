"""The retrained models of another run, for a run that only fine-tunes them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib import units
from experiments.lib.errors import RunError
from experiments.lib.manifest import plain, read_manifest

FLAG = "--retrained"


class RetrainedModels:
    """The finished retrainings in a run folder, which another process may still be writing to.

    Args:
        folder: the run's.
        experiment: the experiment that it must be of.

    Raises:
        RunError: there is no such run, or its files are damaged.
    """

    def __init__(self, folder: Path, experiment: str):
        self.folder = folder
        self._manifest = read_manifest(folder, FLAG, experiment)
        self._done = units.finished(folder, FLAG)

    def check(
        self,
        settings: Any,
        methods: Iterable[str],
        part_of: Mapping[str, Sequence[str]],
        data: Mapping[str, str],
    ) -> None:
        """Refuses models that were retrained otherwise than this run would retrain them.

        Args:
            settings: resolved settings of this run.
            methods: whose models are wanted.
            part_of: by field the methods and the like that read it; the others are for all.
            data: checksums of this run's data.

        Raises:
            RunError: a setting of one of the methods, or the data, differ.
        """
        before = self._manifest["settings"]
        for method in methods:
            readers = {method}
            if settings.shared_head == "refit" and method in part_of["shared_head"]:
                readers.add("last-layer")  # refitting is configured as this fine-tuning is
            for field in dataclasses.fields(settings):
                free = field.metadata.get("run_only") or field.metadata.get("extends")
                if free or readers.isdisjoint(part_of.get(field.name, readers)):
                    continue
                was = before.get(field.name, plain(field.default))
                wanted = plain(getattr(settings, field.name))
                if was != wanted:
                    raise RunError(
                        f"{FLAG}: in {self.folder} {method} was retrained with {field.name} "
                        f"{was!r}, here it is {wanted!r}; give the same or retrain anew"
                    )
        for name, sha256 in data.items():
            if self._manifest["data"].get(name) != sha256:
                raise RunError(f"{FLAG}: {self.folder} was retrained on other data ({name})")

    def weights(self, unit: str, name: str) -> Path:
        """Returns the file of a retrained model.

        Args:
            unit: the retraining's name among the run's units of work.
            name: the file's name.

        Raises:
            RunError: the retraining is not finished there.
        """
        if unit not in self._done:
            raise RunError(
                f"{FLAG}: {self.folder} has not finished {unit!r}; leave it out by --retrain and "
                "--seeds now, and add it later with --resume"
            )
        return self.folder / "weights" / name
