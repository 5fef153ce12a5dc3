"""The manifest of a run: what was run, with which settings and versions, where and when."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import metalora
from experiments.lib import machine
from experiments.lib.errors import RunError

MANIFEST = "manifest.json"
RETRAINED_MODEL = "retrained model"  # how the names of such data begin


def new_manifest(settings: Any, experiment: str) -> dict[str, Any]:
    """Returns the manifest of a run that begins now."""
    return {
        "experiment": experiment,
        "status": "running",
        "started": now(),
        "command": [sys.executable, *sys.argv],
        "settings": _described(settings),
        "data": {},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "metalora": metalora.__version__,
            "native": metalora.build_info(),
        },
        "git": _git_state(),
        "machine": machine.description(),
    }


def resumed_manifest(folder: Path, settings: Any, experiment: str) -> dict[str, Any]:
    """Returns the manifest of a run that goes on now.

    Settings made with ``cli.option(extends=True)`` may have grown, and settings that an older
    version did not have yet may be there with their defaults. Either is then an entry of
    "extended" in the manifest, with the time, the command and the state of the checkout.

    Raises:
        RunError: it is damaged, or of another experiment, or of a run with other settings.
    """
    manifest = read_manifest(folder, "--resume", experiment)
    if not isinstance(manifest.get("resumed", []), list):
        raise RunError(f"--resume: {folder} holds committed results, not a run; start a new run")
    before, described = manifest["settings"], _described(settings)
    fields = {field.name: field for field in dataclasses.fields(settings)}
    added: dict[str, Any] = {}
    grown: dict[str, Any] = {}
    other = []
    for n in {**before, **described}:
        field = fields.get(n)
        if field is not None and field.metadata.get("run_only"):
            continue
        was, is_now = before.get(n), described.get(n)
        if n not in before and field is not None:
            was = added[n] = plain(field.default)
        if was == is_now:
            continue
        if field is None or not field.metadata.get("extends"):
            other.append(f"{n} (was {was!r}, now {is_now!r})")
        elif not _has_grown(was, is_now):
            other.append(f"{n} (was {was!r}, now {is_now!r}, but it can only grow)")
        else:
            grown[n] = {"was": was, "now": is_now}
    if other:
        raise RunError(
            f"--resume: other settings than the run in {folder}: {', '.join(other)}; "
            "give the same ones or choose another --out"
        )
    manifest.pop("reason", None)
    manifest.update(status="running", settings=described)
    here = {"time": now(), "git": _git_state(), "machine": machine.description()}
    manifest.setdefault("resumed", []).append(here)
    if grown or added:
        manifest.setdefault("extended", []).append(
            {
                "time": now(),
                "command": [sys.executable, *sys.argv],
                "git": _git_state(),
                "settings": grown,
                "new_settings": added,
            }
        )
    return manifest


def read_manifest(folder: Path, flag: str, experiment: str) -> dict[str, Any]:
    """Returns the manifest of a run that another one builds on.

    Args:
        folder: the run's.
        flag: the option that names it, for the message.
        experiment: the experiment that it must be of.

    Raises:
        RunError: there is no run, or one of another experiment.
    """
    if not (folder / MANIFEST).is_file():
        raise RunError(f"{flag}: {folder} holds no run ({MANIFEST} is missing)")
    manifest = _read(folder / MANIFEST, flag)
    if manifest.get("experiment") != experiment:
        found = manifest.get("experiment")
        raise RunError(f"{flag}: {folder} holds a run of {found!r}, not of {experiment!r}")
    return manifest


def now() -> str:
    """Returns the time in the form in which a manifest has it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def plain(value: Any, keep_nan: bool = False) -> Any:
    """Converts a value for JSON: torch's and numpy's numbers to Python's, NaN and inf to null."""
    if isinstance(value, Mapping):
        return {str(k): plain(v, keep_nan) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, keep_nan) for v in value]
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist(), keep_nan)
    if isinstance(value, float) and not math.isfinite(value) and not keep_nan:
        return None
    if isinstance(value, (Path, torch.device, torch.dtype)):
        return str(value)
    return value


def _described(settings: Any) -> dict[str, Any]:
    described: dict[str, Any] = plain(dataclasses.asdict(settings))
    return described


def _has_grown(was: Any, is_now: Any) -> bool:
    """Returns whether a number is larger than before, or all values of a list are still there."""
    if isinstance(was, list) and isinstance(is_now, list):
        return all(value in is_now for value in was)
    return type(was) is int and type(is_now) is int and was < is_now


def _read(path: Path, flag: str) -> dict[str, Any]:
    damaged = RunError(f"{flag}: {path} is damaged; start a new run")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(manifest, dict):
        raise damaged
    found = {"notes": {}, "resumed": [], "extended": [], "wall_seconds": 0.0, **manifest}
    kinds: dict[str, Any] = {
        **dict.fromkeys(("settings", "data", "notes"), dict),
        "resumed": (list, int),  # when and where, or in committed results how often
        "extended": list,
    }
    right = all(isinstance(found.get(name), kind) for name, kind in kinds.items())
    if not right or not isinstance(found["wall_seconds"], (int, float)):
        raise damaged
    return manifest


def _git_state() -> dict[str, Any] | None:
    """Returns the checkout's commit and whether files differ from it; None outside a checkout."""
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
