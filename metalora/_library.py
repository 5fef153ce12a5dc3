"""Loads the native libraries; never raises, and records why a library is unavailable."""

from __future__ import annotations

import ctypes
import functools
import importlib
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch

from metalora._checks import first_line

F = TypeVar("F", bound=Callable[..., Any])

_HERE = Path(__file__).parent
_ARCHITECTURE = re.compile(r"(?<![\w.])(\d+)\.(\d+)([af]?)(\+PTX)?(?![\w.+])")
REINSTALL = "METALORA_BUILD={} pip install --no-build-isolation --no-deps -e ."
MATMUL, INSTRUCTIONS = "METALORA_MATMUL", "METALORA_CPU_ISA"
_VALUES = {
    MATMUL: ("auto", "default", "onednn"),
    INSTRUCTIONS: ("portable", "avx2", "avx512", "avx512_bf16"),  # as in csrc/cpu/isa.h
}


def _load_cpu() -> tuple[ModuleType | None, str]:
    if os.environ.get("METALORA_NATIVE", "1") == "0":
        return None, "switched off by METALORA_NATIVE=0"
    if not _built("_C"):
        how = REINSTALL.format("cpu")
        other = _shadowed("_C")
        if other is None:
            return None, f"not built (METALORA_BUILD=none, or no C++ compiler); to build: {how}"
        problem = (
            f"not built in {_HERE}, which Python imports instead of the installed {other}, where "
            f"it is; run from another folder, or build it here: {how}"
        )
        warnings.warn(f"metalora: the native CPU library is {problem}", stacklevel=2)
        return None, problem
    try:
        return importlib.import_module("metalora._C"), "loaded"
    except (ImportError, OSError) as error:
        how = REINSTALL.format("cpu")
        return None, f"built, but does not load: {first_line(error)}; to rebuild: {how}"


def _load_cuda(cpu: ModuleType | None) -> tuple[str | None, str]:
    """The architectures that the CUDA library was built for, None without it; and its state."""
    if cpu is None:
        return None, f"needs the CPU library, which is {cpu_status}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} has no CUDA"
    path = _built("_C_cuda")
    if path is None:
        how = REINSTALL.format("cuda")
        return None, f"not built (no matching CUDA toolkit was found); to build: {how}"
    try:
        torch.ops.load_library(str(path))
        architectures = ctypes.CDLL(str(path)).metalora_cuda_architectures
    except (ImportError, OSError, AttributeError) as error:
        how = REINSTALL.format("cuda")
        return None, f"built, but does not load: {first_line(error)}; to rebuild: {how}"
    architectures.restype = ctypes.c_char_p
    return architectures().decode(), "loaded"


def _built(name: str, folder: Path = _HERE) -> Path | None:
    """The library's file in the package's folder; editable and plain installs put it there.

    Beside it may lie the files of builds for other Pythons.
    """
    files = (folder / f"{name}{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((file for file in files if file.is_file()), None)


def _shadowed(name: str) -> Path | None:
    """The folder of another metalora on Python's path that has this library."""
    folders = [Path(entry, "metalora") for entry in sys.path]
    return next((f for f in folders if f.resolve() != _HERE.resolve() and _built(name, f)), None)


def variable(name: str) -> str | None:
    """The value of METALORA_MATMUL or METALORA_CPU_ISA; None where it is not set, or unknown."""
    value = os.environ.get(name)
    return value if value in _VALUES[name] else None


def _check_variables() -> None:
    """Warns of unknown values, and of instructions that this CPU does not have."""
    for name, values in _VALUES.items():
        if os.environ.get(name) and variable(name) is None:
            warnings.warn(
                f"metalora: {name} must be one of {', '.join(values)}, got {os.environ[name]!r}; "
                "it is taken as not set",
                stacklevel=2,
            )
    wanted, order = variable(INSTRUCTIONS), _VALUES[INSTRUCTIONS]
    best = None if _cpu_module is None else _cpu_module.build_info()["best instructions"]
    if wanted and best and order.index(wanted) > order.index(best):
        warnings.warn(
            f"metalora: {INSTRUCTIONS}={wanted} cannot be had: the most that this CPU and this "
            f"build have is {best}, which is used",
            stacklevel=2,
        )


_cpu_module, cpu_status = _load_cpu()
_cuda_architectures, cuda_status = _load_cuda(_cpu_module)
_check_variables()


def native_available(device_type: str = "cpu") -> bool:
    """Whether native kernels for tensors of this device type ("cpu" or "cuda") are loaded."""
    if device_type == "cpu":
        return _cpu_module is not None
    return device_type == "cuda" and _cuda_architectures is not None


def constant_when_compiled(function: F) -> F:
    """Marks a function whose result torch.compile takes as a constant.

    As torch.compiler.assume_constant_result does, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def gpu_problem(index: int) -> str | None:
    """Why the CUDA kernels cannot run on this GPU, or None where they can."""
    return _gpu_problem(index)


@functools.cache
def _gpu_problem(index: int) -> str | None:
    if _cuda_architectures is None:
        return f"the native CUDA library is {cuda_status}"
    capability = torch.cuda.get_device_capability(index)
    if runs_on(_cuda_architectures, capability):
        return None
    return (
        f"the native CUDA library was built for compute capability {_cuda_architectures}, and "
        f"{torch.cuda.get_device_name(index)} has {capability[0]}.{capability[1]}; to build for "
        f"it: TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]} {REINSTALL.format('cuda')}"
    )


_JETSON = {(8, 7), (10, 1)}


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for these architectures ("8.0;9.0+PTX") runs on a GPU of this capability.

    Machine code runs on GPUs of the same major version from its own minor version on, PTX on all
    newer GPUs, and what is specific to an architecture ("9.0a") on that alone. Jetson's (8.7 and
    10.1) and the others do not run each other's machine code. Entries that are no architecture, as
    of a list that setup.py did not write, are left out.
    """
    for major_text, minor_text, specific, ptx in _ARCHITECTURE.findall(architectures):
        major, minor = int(major_text), int(minor_text)
        if specific:
            fits = capability == (major, minor)
        else:
            newer = bool(ptx) and capability >= (major, minor)
            same = capability == (major, minor) or _JETSON.isdisjoint({capability, (major, minor)})
            fits = newer or (same and capability[0] == major and capability[1] >= minor)
        if fits:
            return True
    return False


@constant_when_compiled
def gpu_memory(index: int) -> int:
    """Bytes of memory that this GPU has."""
    return _gpu_memory(index)


@functools.cache
def _gpu_memory(index: int) -> int:
    return torch.cuda.get_device_properties(index).total_memory


def build_info() -> dict[str, str]:
    """The state of the native libraries: "cpu" and "cuda" say whether each is loaded or why not.

    Where the CPU library is loaded, "compiler" and "torch" say what it was built with,
    "instructions" which instruction set its kernels use and "best instructions" which is the best
    that this CPU has; where the CUDA library is, "architectures" says for which GPUs.
    """
    built = dict(_cpu_module.build_info()) if _cpu_module is not None else {}
    if _cuda_architectures is not None:
        built["architectures"] = _cuda_architectures
    return {"cpu": cpu_status, "cuda": cuda_status, **built}


def measure_libraries() -> dict[str, tuple[float, float]]:
    """GFLOP/s on one core and relative error of float32 products, by library; takes 0.15 s.

    "default" is torch's, and "onednn" is there where the CPU library can call it.
    """
    assert _cpu_module is not None
    return dict(_cpu_module.measure_libraries())
