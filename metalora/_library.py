"""Loads the native libraries; never fails, and knows afterwards why something is off."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import torch

_REINSTALL = "METALORA_BUILD={} pip install --no-build-isolation --force-reinstall --no-deps ."


def _load_cpu() -> tuple[ModuleType | None, str]:
    if os.environ.get("METALORA_NATIVE", "1") == "0":
        return None, "switched off by METALORA_NATIVE=0"
    if not _built("_C"):
        how = _REINSTALL.format("cpu")
        return None, f"not built (METALORA_BUILD=none, or no C++ compiler); to build: {how}"
    try:
        return importlib.import_module("metalora._C"), "loaded"
    except (ImportError, OSError) as error:
        how = _REINSTALL.format("cpu")
        return None, f"built, but does not load: {_first_line(error)}; to rebuild: {how}"


def _load_cuda(cpu: ModuleType | None) -> tuple[bool, str]:
    if cpu is None:
        return False, "needs the CPU library, which defines the operators"
    if torch.version.cuda is None:
        return False, f"torch {torch.__version__} has no CUDA"
    path = _built("_C_cuda")
    if path is None:
        how = _REINSTALL.format("cuda")
        return False, f"not built (no matching CUDA toolkit was found); to build: {how}"
    try:
        torch.ops.load_library(str(path))
    except (ImportError, OSError) as error:
        return False, f"built, but does not load: {_first_line(error)}"
    return True, "loaded"


def _built(name: str) -> Path | None:
    """The library's file beside this module; editable and plain installs both put it there."""
    found = sorted(Path(__file__).parent.glob(f"{name}.*so")) + sorted(
        Path(__file__).parent.glob(f"{name}.pyd")
    )
    return found[0] if found else None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_cpu_module, cpu_status = _load_cpu()
_cuda_loaded, cuda_status = _load_cuda(_cpu_module)


def native_available(device_type: str = "cpu") -> bool:
    """Whether native kernels for tensors of this device type ("cpu" or "cuda") are loaded."""
    if device_type == "cpu":
        return _cpu_module is not None
    return device_type == "cuda" and _cuda_loaded


def build_info() -> dict[str, str]:
    """The state of the native libraries: "cpu" and "cuda" say whether each is loaded or why not.

    Where the CPU library is loaded, "compiler" and "torch" say what it was built with.
    """
    built = dict(_cpu_module.build_info()) if _cpu_module is not None else {}
    return {"cpu": cpu_status, "cuda": cuda_status, **built}
