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
import math
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np
import torch

import metalora
from experiments.lib import lock
from experiments.lib.errors import INTERRUPTED, RunError, too_large
from experiments.lib.machine import description
from metalora._files import replacing, sync_path

MANIFEST, METRICS, RESULTS, UNITS, ERROR = (
    "manifest.json",
    "metrics.jsonl",
    "results.csv",
    "units.jsonl",
    "error.txt",
)
TERMINATED = 143
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


class RunFolder:
    """One run's folder, open for writing.

    Use as a context manager: leaving it records the wall time and the status: "completed",
    "interrupted" (Ctrl-C or SIGTERM: one line, exit code 130 or 143) or "failed" (with the
    traceback in error.txt, and the reason in the manifest). The folder is readable at any moment,
    whatever ends the process. What cannot be written, such as on a full disk, is a `RunError`. Only
    a new run that asks for more memory than there is, before it has a result, leaves nothing.
    """

    def __init__(
        self,
        folder: Path,
        held: lock.FolderLock,
        manifest: dict[str, Any],
        units: dict[str, dict[str, Any]],
    ):
        self.folder = folder
        self.manifest = manifest
        self._lock = held
        self._units = units
        self._columns = _header(folder / RESULTS)
        self._started = time.monotonic()
        self._earlier = float(manifest.get("wall_seconds", 0.0))
        self._previous_handler: Any = None
        self._go_on = f"--resume --out {folder}"

    @classmethod
    def create(
        cls,
        out: Path | None,
        settings: Any,
        *,
        experiment: str,
        tag: str = "",
        resume: bool = False,
        command: Sequence[str] | None = None,
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
            command: the command line; None is this process's own.
            go_on: the options that go on with the run, for the message after an interruption;
                "" is ``--resume --out <folder>``.

        Raises:
            RunError: the folder exists and is not empty (without ``resume``); there is no run in
                it, or one of another experiment or with other settings (with ``resume``); another
                process works in it, or it cannot be written to.
        """
        if resume:
            run = cls._reopen(out, settings, experiment)
        else:
            run = cls._new(out, settings, experiment, tag, command)
        run._go_on = go_on or run._go_on
        try:
            run._write_manifest()
        except OSError as error:
            if not resume:
                _remove_empty(run.folder)
            run.close()
            raise _not_written(run.folder, error, run._go_on if resume else "") from None
        return run

    @classmethod
    def _new(
        cls,
        out: Path | None,
        settings: Any,
        experiment: str,
        tag: str,
        command: Sequence[str] | None,
    ) -> RunFolder:
        folder = default_folder(experiment, tag) if out is None else Path(out)
        if folder.is_file():
            raise RunError(f"{folder} is a file; choose another --out")
        _check_empty(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"cannot make output folder {folder}: {error.strerror}; choose another --out"
            ) from None
        held = _lock(folder)
        try:
            _check_empty(folder)  # another run may have begun in it
        except RunError:
            held.release()
            raise
        manifest = {
            "experiment": experiment,
            "status": "running",
            "started": _now(),
            "command": list(command if command is not None else [sys.executable, *sys.argv]),
            "settings": _described(settings),
            "data": {},
            "versions": _versions(),
            "git": _git_state(),
            "machine": description(),
        }
        return cls(folder, held, manifest, {})

    @classmethod
    def _reopen(cls, out: Path | None, settings: Any, experiment: str) -> RunFolder:
        if out is None:
            raise RunError("--resume needs --out, the folder of the run to go on with")
        folder = Path(out)
        if not (folder / MANIFEST).exists():
            raise RunError(f"--resume: {folder} holds no run ({MANIFEST} is missing)")
        held = _lock(folder)
        try:
            manifest = _read_manifest(folder)
            _check_same_run(folder, manifest, settings, experiment)
            units = _cut_back(folder)
        except BaseException:
            held.release()
            raise
        manifest.update(status="running", settings=_described(settings))
        manifest.pop("reason", None)
        manifest.setdefault("resumed", []).append(_now())
        return cls(folder, held, manifest, units)

    def path(self, name: str) -> Path:
        """The path of a file in this folder."""
        return self.folder / name

    def add_data(self, name: str, sha256: str) -> None:
        """Records a checksum of the data; refuses a resumed run whose data have changed."""
        before = self.manifest["data"].setdefault(name, sha256)
        if before != sha256:
            raise RunError(
                f"--resume: the data {name!r} are not those the run began with "
                f"(sha256 {before[:12]}… before, {sha256[:12]}… now)"
            )
        self._write_manifest()

    def note(self, **facts: Any) -> None:
        """Adds facts found out during the run, such as throughput, to the manifest."""
        self.manifest.setdefault("notes", {}).update(_plain(facts))
        self._write_manifest()

    def log(self, **record: Any) -> None:
        """Appends one line to metrics.jsonl."""
        line = json.dumps(_plain(record), allow_nan=False) + "\n"
        _append(self.path(METRICS), line)

    def add_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends measured values to results.csv, all of the rows or, if interrupted, none.

        Raises:
            ValueError: the rows' columns are not those already in the file.
        """
        if not rows:
            return
        columns = self._columns or list(rows[0])
        for row in rows:
            if list(row) != columns:
                raise ValueError(f"add_rows: columns must be {columns}, got {list(row)}")
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        if self._columns is None:
            writer.writeheader()
        writer.writerows({c: _plain(row[c], keep_nan=True) for c in columns} for row in rows)
        _append(self.path(RESULTS), text.getvalue())
        self._columns = columns

    def rows(self) -> list[dict[str, str]]:
        """What results.csv holds by now."""
        return read_rows(self.path(RESULTS)) if self.path(RESULTS).exists() else []

    def records(self) -> list[dict[str, Any]]:
        """What metrics.jsonl holds by now."""
        if not self.path(METRICS).exists():
            return []
        with self.path(METRICS).open(encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def done(self, unit: str) -> bool:
        """Whether this unit of work was finished, now or before the run was resumed."""
        return unit in self._units

    def mark_done(self, unit: str) -> None:
        """Closes a unit of work: what was written so far stays when the run is resumed."""
        lengths = {}
        for name in (METRICS, RESULTS):
            lengths[name] = _sync(self.path(name))
        record = {"unit": unit, "lengths": lengths}
        _append(self.path(UNITS), json.dumps(record) + "\n")
        _sync(self.path(UNITS))
        sync_path(self.folder)
        self._units[unit] = record

    def write_json(self, name: str, value: Any) -> None:
        """Writes a JSON file; a reader sees the old one or the new one, never a part."""
        _replace(self.path(name), json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")

    def finish(self, status: str = "completed") -> None:
        """Records how the run ended and how long it took."""
        wall = self._earlier + time.monotonic() - self._started
        self.manifest.update(status=status, ended=_now(), wall_seconds=round(wall, 3))
        try:
            self._write_manifest()
        finally:
            self.close()

    def close(self) -> None:
        """Lets other processes use the folder; called by `finish`."""
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
        elif too_large(error) and not self._units:
            self.close()
            shutil.rmtree(self.folder)
        else:
            self._fail(error, "".join(traceback.format_exception(kind, error, trace)))

    def _fail(self, error: BaseException | None, trace: str) -> None:
        """Records the error as far as it can be written; of a full disk a `RunError`."""
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

    def _write_manifest(self) -> None:
        self.write_json(MANIFEST, self.manifest)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results.csv."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def default_folder(experiment: str, tag: str = "") -> Path:
    """``runs/<experiment>-<tag>-<UTC time>``."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
    return Path("runs") / "-".join(part for part in (experiment, tag, stamp) if part)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    return statistics.stdev(values) / math.sqrt(len(values))


def with_error(mean: float, error: float, form: str = ".2f") -> str:
    """``mean (error)`` in the format ``form``; n/a for an error that is NaN."""
    return f"{mean:{form}} ({'n/a' if math.isnan(error) else format(error, form)})"


class _Terminated(KeyboardInterrupt):
    """SIGTERM, seen as an interrupt so that it ends the run in the same orderly way."""


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise _Terminated


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _described(settings: Any) -> dict[str, Any]:
    described: dict[str, Any] = _plain(dataclasses.asdict(settings))
    return described


def _plain(value: Any, keep_nan: bool = False) -> Any:
    """As JSON can hold it: numbers of torch and numpy as Python's, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, keep_nan) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, keep_nan) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return _plain(value.tolist(), keep_nan)
    if isinstance(value, float) and not math.isfinite(value) and not keep_nan:
        return None
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    return value


def _append(path: Path, text: str) -> None:
    # One unbuffered write: an interrupt comes before it or after it, not within the rows.
    with path.open("ab", buffering=0) as file:
        data = text.encode()
        while (written := file.write(data)) < len(data):  # the disk is full: the next one says so
            data = data[written:]


def _replace(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode())


def _lock(folder: Path) -> lock.FolderLock:
    try:
        return lock.FolderLock(folder)
    except lock.FolderInUse as holder:
        raise RunError(
            f"{folder} is in use by {holder}; wait until that has ended, or choose another --out"
        ) from None
    except OSError as error:
        raise _not_written(folder, error, "") from None


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


def _read_manifest(folder: Path) -> dict[str, Any]:
    damaged = RunError(f"--resume: {folder / MANIFEST} is damaged; start a new run")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise damaged from None
    wanted = {"settings": dict, "data": dict, "notes": dict, "resumed": list}
    optional = {"notes": {}, "resumed": [], "wall_seconds": 0.0}
    if not isinstance(manifest, dict):
        raise damaged
    found = {**optional, **manifest}
    right = all(isinstance(found.get(name), kind) for name, kind in wanted.items())
    if not right or not isinstance(found["wall_seconds"], (int, float)):
        raise damaged
    return manifest


def _check_same_run(folder: Path, manifest: dict[str, Any], settings: Any, experiment: str) -> None:
    if manifest.get("experiment") != experiment:
        raise RunError(
            f"--resume: {folder} holds a run of {manifest.get('experiment')!r}, "
            f"not of {experiment!r}"
        )
    before, described = manifest["settings"], _described(settings)
    free = {f.name for f in dataclasses.fields(settings) if f.metadata.get("run_only")}
    names = [n for n in {**before, **described} if n not in free]
    other = [n for n in names if before.get(n) != described.get(n)]
    if other:
        changes = ", ".join(f"{n} (was {before.get(n)!r}, now {described.get(n)!r})" for n in other)
        raise RunError(
            f"--resume: other settings than the run in {folder}: {changes}; "
            "give the same ones or choose another --out"
        )


def _sync(path: Path) -> int:
    """Has the system write the file out, and returns its length in bytes."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _cut_back(folder: Path) -> dict[str, dict[str, Any]]:
    """The finished units; the files lose whatever an unfinished unit wrote after them."""
    units: dict[str, dict[str, Any]] = {}
    path = folder / UNITS
    if path.exists():
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # the process may be killed while it writes a line
        for number, line in enumerate(whole.splitlines(), 1):
            record = _unit(line)
            if record is None:
                raise RunError(
                    f"--resume: line {number} of {path} is not of a run: "
                    f"{line[:60].decode(errors='replace')!r}; take it out, or start a new run"
                )
            units[record["unit"]] = record
        os.truncate(path, len(whole))
    lengths = list(units.values())[-1]["lengths"] if units else {METRICS: 0, RESULTS: 0}
    for name, length in lengths.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size < length:
            raise RunError(
                f"--resume: {folder / name} is damaged ({size} bytes, {length} when its last unit "
                "was finished); start a new run"
            )
        if (folder / name).exists():
            os.truncate(folder / name, length)
    return units


def _unit(line: bytes) -> dict[str, Any] | None:
    """A record of a finished unit; None if the line is something else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or not isinstance(record.get("unit"), str):
        return None
    lengths = record.get("lengths")
    if not isinstance(lengths, dict) or lengths.keys() != {METRICS, RESULTS}:
        return None
    right = all(type(length) is int and length >= 0 for length in lengths.values())
    return record if right else None


def _header(path: Path) -> list[str] | None:
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


def _versions() -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "metalora": metalora.__version__,
        "native": metalora.build_info(),
    }


def _git_state() -> dict[str, Any] | None:
    """The checkout's commit and whether its files were changed; None outside a checkout."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10
        )
        done.check_returncode()
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "changed": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
