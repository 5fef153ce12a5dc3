"""Run folders: what a run was (manifest.json), how it went (metrics.jsonl), its results.csv.

A run is a list of named units of work (one retraining, one fine-tuning, ...). ``mark_done`` closes
a unit and records how long the files were by then; ``--resume`` cuts them back to that length, so
that a unit which was stopped half-way leaves nothing behind and is simply done again. One process
at a time has the folder: its lock is held until the run ends, see `experiments.lib.lock`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import datetime
import errno
import io
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, TypeVar

from experiments.lib import lock, units
from experiments.lib.errors import INTERRUPTED, RunError, too_large
from experiments.lib.manifest import (
    MANIFEST,
    RETRAINED_MODEL,
    new_manifest,
    now,
    plain,
    resumed_manifest,
)
from experiments.lib.units import METRICS, RESULTS
from metalora._errors import DivergedError
from metalora._files import replacing

Settings = TypeVar("Settings")
ERROR = "error.txt"
TERMINATED = 143
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunFiles:
    """One run's folder, to read what it holds.

    Attributes:
        folder: where it is; figures are drawn into it.
        manifest: what its manifest.json says.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest

    def path(self, name: str) -> Path:
        """Returns the path of a file in this folder."""
        return self.folder / name

    def settings(self, kind: type[Settings]) -> Settings:
        """Returns the settings in the manifest; fields that it lacks have their defaults.

        Args:
            kind: the experiment's dataclass of settings.
        """
        known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
        found = self.manifest["settings"].items()
        given = {k: tuple(v) if isinstance(v, list) else v for k, v in found if k in known}
        return kind(**given)

    def rows(self) -> list[dict[str, str]]:
        """Returns the rows of results.csv so far."""
        return read_rows(self.path(RESULTS)) if self.path(RESULTS).exists() else []

    def records(self) -> list[dict[str, Any]]:
        """Returns the records of metrics.jsonl so far."""
        if not self.path(METRICS).exists():
            return []
        with self.path(METRICS).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]


class RunFolder(RunFiles):
    """One run's folder, open for writing.

    Use as a context manager: leaving it records the wall time and the status: "completed",
    "interrupted" (Ctrl-C or SIGTERM: one line, exit code 130 or 143) or "failed" (with the
    traceback in error.txt, and the reason in the manifest). The folder is readable at any moment,
    whatever ends the process. What cannot be written, such as on a full disk, is a `RunError`. Only
    a new run that has written nothing yet, and asks for more memory than there is, leaves nothing.

    Attributes:
        units_done: the units of work that are finished.
    """

    def __init__(
        self,
        folder: Path,
        held: lock.FolderLock,
        manifest: dict[str, Any],
        done: set[str],
        go_on: str,
    ):
        super().__init__(folder, manifest)
        self._lock = held
        self.units_done = done
        self._columns = _header(folder / RESULTS)
        self._started = time.monotonic()
        self._earlier = float(manifest.get("wall_seconds", 0.0))
        self._previous_handler: Any = None
        self._go_on = go_on
        self._before = ""  # of a resumed run that has not begun to work yet, its manifest

    @classmethod
    def create(
        cls,
        out: Path | None,
        settings: Any,
        *,
        experiment: str,
        tag: str = "",
        resume: bool = False,
        go_on: str = "",
    ) -> RunFolder:
        """Makes a new run folder, or opens one to go on with it.

        Args:
            out: the folder; None is ``runs/<experiment>-<tag>-<UTC time>``.
            settings: a dataclass instance. Fields made with ``cli.option(run_only=True)``, such as
                the folder itself, may differ between a run and its resumption.
            experiment: name of the experiment, for the manifest.
            tag: what tells this run from others of the experiment, such as the data set.
            resume: go on with the run in ``out`` instead of making a new folder.
            go_on: the options that go on with the run, for the message after an interruption;
                "" is ``--resume --out <folder>``.

        Raises:
            RunError: the folder exists and is not empty (without ``resume``); there is no run in
                it, or one of another experiment or with other settings (with ``resume``); another
                process works in it, or it cannot be written to.
        """
        if resume:
            folder = _existing(out)
        else:
            folder = _new(default_folder(experiment, tag) if out is None else Path(out))
        go_on = go_on or f"--resume --out {folder}"
        held = None
        try:
            held = lock.FolderLock(folder)
            if resume:
                manifest = resumed_manifest(folder, settings, experiment)
                run = cls(folder, held, manifest, units.cut_back(folder), go_on)
                run._before = (folder / MANIFEST).read_text(encoding="utf-8")
            else:
                _check_empty(folder)  # another run may have begun in it
                run = cls(folder, held, new_manifest(settings, experiment), set(), go_on)
            run._write_manifest()
        except BaseException as error:
            if held is not None:
                held.release()
            if not isinstance(error, OSError):
                raise
            if not resume:
                _remove_empty(folder)
            raise _not_written(folder, error, go_on if resume else "") from None
        return run

    def add_data(self, name: str, sha256: str) -> None:
        """Records a checksum of the data; refuses a resumed run whose data have changed."""
        data, taken = self.manifest["data"], name.startswith(RETRAINED_MODEL)
        if name not in data and self.units_done and not taken:
            raise RunError(
                f"--resume: the run has no checksum of the data {name!r}: it began without them, "
                "or with an earlier version; start a new run"
            )
        before = data.setdefault(name, sha256)
        if before != sha256:
            raise RunError(
                f"--resume: the data {name!r} are not those the run began with "
                f"(sha256 {before[:12]}… before, {sha256[:12]}… now)"
            )
        self._write_manifest()

    def note(self, **facts: Any) -> None:
        """Adds facts found out during the run, such as throughput, to the manifest."""
        self.manifest.setdefault("notes", {}).update(plain(facts))
        self._write_manifest()

    def log(self, **record: Any) -> None:
        """Appends one line to metrics.jsonl."""
        self._before = ""
        line = json.dumps(plain(record), allow_nan=False) + "\n"
        units.append(self.path(METRICS), line)

    def add_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends measured values to results.csv, all of the rows or, if interrupted, none.

        Raises:
            ValueError: the rows' columns are not those already in the file.
        """
        if not rows:
            return
        self._before = ""
        columns = self._columns or list(rows[0])
        for row in rows:
            if list(row) != columns:
                raise ValueError(f"add_rows: columns must be {columns}, got {list(row)}")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if self._columns is None:
            writer.writeheader()
        writer.writerows({c: plain(row[c], keep_nan=True) for c in columns} for row in rows)
        units.append(self.path(RESULTS), text.getvalue())
        self._columns = columns

    def expect_columns(self, columns: Sequence[str]) -> None:
        """Refuses a resumed run whose results.csv has other columns.

        Raises:
            RunError: it was made by another version.
        """
        if self._columns not in (None, list(columns)):
            raise RunError(
                f"--resume: {self.path(RESULTS)} has the columns {self._columns} of another "
                f"version, not {list(columns)}; start a new run"
            )

    def done(self, unit: str) -> bool:
        """Returns whether this unit of work is finished, in this process or before a resumption."""
        return unit in self.units_done

    def mark_done(self, unit: str) -> None:
        """Closes a unit of work: everything written so far is kept when the run is resumed."""
        self._before = ""
        units.finish(self.folder, unit)
        self.units_done.add(unit)

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file; a reader sees the old one or the new one, never a part."""
        _replace(self.path(name), json.dumps(plain(value), indent=2, allow_nan=False) + "\n")

    def finish(self, status: str = "completed") -> None:
        """Records how the run ended and how long it took."""
        wall = self._earlier + time.monotonic() - self._started
        self.manifest.update(status=status, ended=now(), wall_seconds=round(wall, 3))
        try:
            self._write_manifest()
        finally:
            self.close()

    def close(self) -> None:
        """Releases the folder to other processes; `finish` calls it."""
        self._lock.release()

    def __enter__(self) -> RunFolder:
        with contextlib.suppress(ValueError):  # only the main thread may set handlers
            self._previous_handler = signal.signal(signal.SIGTERM, _on_sigterm)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
        if kind is None:
            try:
                self.finish()
            except OSError as failure:
                raise _not_written(self.folder, failure, self._go_on) from None
        elif issubclass(kind, KeyboardInterrupt):
            with contextlib.suppress(OSError):
                self.finish("interrupted")
            terminated = isinstance(error, _Terminated)
            print(
                f"{'terminated' if terminated else 'interrupted'}: finished results are in "
                f"{self.folder}; go on with {self._go_on}",
                file=sys.stderr,
            )
            raise SystemExit(TERMINATED if terminated else INTERRUPTED) from None
        elif too_large(error) and self._is_untouched():
            shutil.rmtree(self.folder, ignore_errors=True)  # while no other process can have it
            self.close()
        else:
            self._fail(error, "".join(traceback.format_exception(kind, error, trace)))

    def _fail(self, error: BaseException | None, trace: str) -> None:
        """Records the error as far as possible, and turns a full disk into a `RunError`.

        A resumption that was refused before it did anything leaves the run as it was.
        """
        refused = isinstance(error, RunError) and not isinstance(error.__cause__, DivergedError)
        if self._before and refused:
            with contextlib.suppress(OSError):
                _replace(self.path(MANIFEST), self._before)
            self.close()
            return
        told = error
        if isinstance(error, OSError) and error.errno in _CANNOT_WRITE:
            told = _not_written(self.folder, error, self._go_on)
        self.manifest["reason"] = f"{type(told).__name__}: {' '.join(str(told).split())}"
        with contextlib.suppress(OSError):
            _replace(self.path(ERROR), trace)
        with contextlib.suppress(OSError):
            self.finish("failed")
        if told is not error:
            raise told from None  # type: ignore[misc]

    def _is_untouched(self) -> bool:
        """Returns whether this run is new and its folder holds only what making it wrote."""
        if "resumed" in self.manifest:
            return False
        with contextlib.suppress(OSError):
            return {found.name for found in self.folder.iterdir()} <= {lock.NAME, MANIFEST}
        return False

    def _write_manifest(self) -> None:
        self.write_json(MANIFEST, self.manifest)


def read_rows(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a results.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def default_folder(experiment: str, tag: str = "") -> Path:
    """Returns ``runs/<experiment>-<tag>-<UTC time>``."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "-".join(part for part in (experiment, tag, stamp) if part)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, seen as an interrupt so that it ends the run in the same orderly way."""


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _existing(out: Path | None) -> Path:
    if out is None:
        raise RunError("--resume needs --out, the folder of the run to go on with")
    if not (out / MANIFEST).exists():  # before anything is written there
        raise RunError(f"--resume: {out} holds no run ({MANIFEST} is missing)")
    return out


def _new(folder: Path) -> Path:
    if folder.is_file():
        raise RunError(f"{folder} is a file; choose another --out")
    _check_empty(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"cannot make output folder {folder}: {error.strerror}; choose another --out"
        ) from None
    return folder


def _check_empty(folder: Path) -> None:
    if folder.exists() and any(found.name != lock.NAME for found in folder.iterdir()):
        hint = " or add --resume to go on with it" if (folder / MANIFEST).is_file() else ""
        raise RunError(
            f"output folder {folder} exists and is not empty; choose another --out{hint}"
        )


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        (folder / lock.NAME).unlink()
        folder.rmdir()


def _not_written(folder: Path, error: OSError, go_on: str) -> RunError:
    inside = error.filename is None or str(error.filename).startswith(str(folder))
    where = folder if inside else error.filename
    then = f"make room, then go on with {go_on}" if go_on else "make room or choose another --out"
    return RunError(f"cannot write to {where}: {error.strerror or error}; {then}")


def _header(path: Path) -> list[str] | None:
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))
