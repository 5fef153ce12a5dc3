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

    Raises:
        RunError: it is damaged, or of another experiment, or of a run with other settings.
    """
    manifest = _read(folder / MANIFEST)
    name, before, described = manifest.get("experiment"), manifest["settings"], _described(settings)
    if name != experiment:
        raise RunError(f"--resume: {folder} holds a run of {name!r}, not of {experiment!r}")
    free = {f.name for f in dataclasses.fields(settings) if f.metadata.get("run_only")}
    names = [n for n in {**before, **described} if n not in free]
    other = [n for n in names if before.get(n) != described.get(n)]
    if other:
        changes = ", ".join(f"{n} (was {before.get(n)!r}, now {described.get(n)!r})" for n in other)
        raise RunError(
            f"--resume: other settings than the run in {folder}: {changes}; "
            "give the same ones or choose another --out"
        )
    manifest.pop("reason", None)
    manifest.update(status="running", settings=described)
    manifest.setdefault("resumed", []).append(now())
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


def _read(path: Path) -> dict[str, Any]:
    damaged = RunError(f"--resume: {path} is damaged; start a new run")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise damaged from None
    if not isinstance(manifest, dict):
        raise damaged
    found = {"notes": {}, "resumed": [], "wall_seconds": 0.0, **manifest}
    kinds = {"settings": dict, "data": dict, "notes": dict, "resumed": list}
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
