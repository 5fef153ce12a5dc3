"""The finished units of a run, and how long its other files were when each was finished."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from experiments.lib.errors import RunError
from metalora._files import sync_path

METRICS, RESULTS, UNITS = "metrics.jsonl", "results.csv", "units.jsonl"


def append(path: Path, text: str) -> None:
    """Appends to a file in one unbuffered write: an interrupt comes before or after it."""
    with path.open("ab", buffering=0) as file:
        data = text.encode()
        while (written := file.write(data)) < len(data):  # the disk is full: the next write says so
            data = data[written:]


def finish(folder: Path, unit: str) -> None:
    """Records that a unit is finished, after writing everything so far to the disk."""
    lengths = {name: _sync(folder / name) for name in (METRICS, RESULTS)}
    append(folder / UNITS, json.dumps({"unit": unit, "lengths": lengths}) + "\n")
    _sync(folder / UNITS)
    sync_path(folder)


def finished(folder: Path, flag: str = "--resume") -> set[str]:
    """Returns the finished units of a run, which may go on meanwhile.

    Args:
        folder: the run's.
        flag: the option that names it, for the message.

    Raises:
        RunError: the list of units is damaged.
    """
    return set(_read(folder, flag)[0])


def cut_back(folder: Path) -> set[str]:
    """Returns the finished units, and cuts off whatever an unfinished unit wrote after them.

    Raises:
        RunError: a file is damaged.
    """
    units, length = _read(folder)
    if (folder / UNITS).exists():
        os.truncate(folder / UNITS, length)
    for name, length in _last(units).items():
        size = (folder / name).stat().st_size if (folder / name).exists() else 0
        if size < length:
            raise RunError(
                f"--resume: {folder / name} is damaged ({size} bytes, {length} when its last unit "
                "was finished); start a new run"
            )
        if size > length:
            os.truncate(folder / name, length)
    return set(units)


def finished_results(folder: Path) -> tuple[int, bytes]:
    """Returns how many units are finished, and the results.csv that these wrote.

    The run may go on meanwhile.

    Raises:
        RunError: a file is damaged.
    """
    units, _ = _read(folder)
    length = _last(units)[RESULTS]
    return len(units), (folder / RESULTS).read_bytes()[:length] if length else b""


def _read(folder: Path, flag: str = "--resume") -> tuple[dict[str, dict[str, int]], int]:
    """Returns the finished units with the lengths of the files, and that of the list itself."""
    units: dict[str, dict[str, int]] = {}
    path = folder / UNITS
    if not path.exists():
        return units, 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]  # the process may be killed while it writes a line
    for number, line in enumerate(whole.splitlines(), 1):
        record = _record(line)
        if record is None:
            raise RunError(
                f"{flag}: line {number} of {path} is not of a run: "
                f"{line[:60].decode(errors='replace')!r}; take it out, or start a new run"
            )
        units[record["unit"]] = record["lengths"]
    return units, len(whole)


def _last(units: dict[str, dict[str, int]]) -> dict[str, int]:
    """Returns how long the files were when the last unit was finished."""
    return list(units.values())[-1] if units else {METRICS: 0, RESULTS: 0}


def _record(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a finished unit; None if the line is something else."""
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


def _sync(path: Path) -> int:
    """Has the system write the file out, and returns its length in bytes."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size
