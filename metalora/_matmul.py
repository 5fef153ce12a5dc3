"""Which library computes large float32 products in the native CPU operators, and why."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import threading
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metalora._files import cache_folder, replacing
from metalora._library import MATMUL, build_info, measure_libraries, native_available, variable
from metalora._warn import warn_user

FASTER = 1.25
"""oneDNN is taken from this many times the default's speed on. Less is not worth the code that it
generates for every new shape, and where the two are near, the default stays the default."""

# What tells one kind of CPU from another in /proc/cpuinfo, on x86 and ARM.
_CPU_FIELDS = "vendor_id", "cpu family", "model", "model name", "stepping"
_ARM_FIELDS = "CPU implementer", "CPU part", "CPU variant"
# Settings of the two libraries that change what they compute, or how fast.
_SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DEBUG_CPU_TYPE", "MKL_ENABLE_INSTRUCTIONS"),
    *("DNNL_DEFAULT_FPMATH_MODE", "DNNL_MAX_CPU_ISA"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "ONEDNN_MAX_CPU_ISA"),
)
MKLDNN: Any = torch.backends.mkldnn  # mypy sees no `matmul` in it
_lock = threading.Lock()


class MatmulLibrary(NamedTuple):
    """The library of large float32 products on the CPU, and why it is that one."""

    name: str  # "default" or "onednn"
    reason: str


class Measurement(NamedTuple):
    """What a library does in the products of a layer's forward and backward, on one core."""

    gigaflops: float  # 1e9 floating-point operations a second
    error: float  # against float64, relative in the Frobenius norm


Measurements = dict[str, Measurement]  # "default" and, where it can be called, "onednn"


def library() -> str | None:
    """Returns the library's name for csrc/library.cpp, which asks again later if it is None.

    That is so while torch is set to shorter products or to go without oneDNN: its default then
    follows these settings, and a comparison with it would say nothing.
    """
    reduced = MKLDNN.matmul.fp32_precision in ("tf32", "bf16")
    if reduced or not MKLDNN.enabled:
        return None
    return matmul_library().name


def matmul_library() -> MatmulLibrary:
    """Returns this process's library; at the first call it may have to be measured (0.15 s)."""
    with _lock:
        return _decide()


@functools.cache
def _decide() -> MatmulLibrary:
    wanted = variable(MATMUL) or "auto"
    if wanted == "default":
        return MatmulLibrary("default", f"{MATMUL}=default")
    if not native_available():
        return MatmulLibrary("default", "the native CPU library, which would choose, is not loaded")
    found, source = _measurements() if MKLDNN.is_available() else ({}, "")
    chosen = choose(found, source, wanted)
    if chosen.name != wanted == "onednn":
        warn_user(f"{MATMUL}=onednn cannot be had: {chosen.reason}; torch's default is used")
    return chosen


def choose(found: Measurements, source: str, wanted: str = "auto") -> MatmulLibrary:
    """Returns the library that follows from measurements and from what the user wants.

    Args:
        found: what was measured.
        source: where the numbers are from, for the reason.
        wanted: "auto" or "onednn".
    """
    if "onednn" not in found:
        return MatmulLibrary("default", "this torch does not call oneDNN on this CPU")
    default, onednn = found["default"], found["onednn"]
    if not onednn.error <= 2 * default.error:
        errors = f"{onednn.error:.1e} beside {default.error:.1e} of torch's default"
        return MatmulLibrary("default", f"oneDNN is not as precise here: its error is {errors}")
    speeds = (
        f"oneDNN {onednn.gigaflops:.0f}, torch's default {default.gigaflops:.0f} GFLOP/s on one "
        f"core, {source}"
    )
    if wanted == "onednn":
        return MatmulLibrary("onednn", f"{MATMUL}=onednn; {speeds}")
    if onednn.gigaflops < FASTER * default.gigaflops:
        return MatmulLibrary("default", f"oneDNN is not {FASTER} times as fast here: {speeds}")
    return MatmulLibrary("onednn", f"it is faster here: {speeds}")


def exact_by_onednn() -> bool:
    """Whether torch's setting "bf16" for float32 products makes them faster here, and still exact.

    With it torch calls oneDNN, which rounds to bfloat16 where the CPU has units for that (AMX), and
    elsewhere computes in float32.
    """
    return matmul_library().name == "onednn" and _computes_in_float32()


@functools.cache
def _computes_in_float32() -> bool:
    if torch.cpu._is_amx_tile_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 256, 256, generator=generator, device="cpu") - 0.5
    exact = a.double() @ b.double()
    layouts = [(x, y) for x in (a, _by_columns(a)) for y in (b, _by_columns(b))]

    def errors() -> list[float]:
        batches = [(x @ y - exact).norm() for x, y in layouts]
        return [float(e) for e in batches + [(x[0] @ y[0] - exact[0]).norm() for x, y in layouts]]

    matmul = MKLDNN.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        default = errors()
        matmul.fp32_precision = "bf16"
        return all(o <= 2 * d for o, d in zip(errors(), default, strict=True))
    finally:
        matmul.fp32_precision = before


def _by_columns(matrices: Tensor) -> Tensor:
    """The same numbers, stored column by column."""
    return matrices.mT.contiguous().mT


def _measurements() -> tuple[Measurements, str]:
    """Returns the numbers for this CPU and torch, and where they are from.

    They are measured if no file has them. A cache folder that cannot be read or written, and a
    damaged file, cost no more than that.
    """
    machine = _machine()
    digest = hashlib.sha256(json.dumps(machine).encode()).hexdigest()[:16]
    try:
        path = cache_folder() / f"matmul-{digest}.json"
    except RuntimeError:  # this user has no home folder
        return _measure(), "measured now"
    found = _read(path, machine)
    if found is not None:
        return found, f"measured before, from {path}"
    found = _measure()
    try:
        with replacing(path) as file:
            file.write(json.dumps({"machine": machine, "measured": found}, indent=1).encode())
    except OSError as error:
        return found, f"measured now, but not kept: {error}"
    return found, f"measured now, kept in {path}"


def _measure() -> Measurements:
    return {name: Measurement(*numbers) for name, numbers in measure_libraries().items()}


def _read(path: Path, machine: dict[str, Any]) -> Measurements | None:
    """Returns what a file holds; None if it is absent, damaged or of another machine."""
    try:
        values = json.loads(path.read_bytes())
        found = {name: Measurement(*map(float, m)) for name, m in values["measured"].items()}
        same = values["machine"] == machine
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    is_whole = "default" in found and all(m.gigaflops > 0 for m in found.values())
    return found if same and is_whole else None


def _machine() -> dict[str, Any]:
    """What the measurements depend on: the CPU, torch, and the settings of its libraries."""
    return {
        "cpu": cpu_fields(),
        "instructions": build_info()["best instructions"],
        "torch": torch.__version__,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def cpu_fields(cpuinfo: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """What tells this kind of CPU from others, by the names that the system has for it."""
    try:
        first = cpuinfo.read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:  # not Linux
        return {"machine": platform.machine(), "processor": platform.processor()}
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in pairs}
    return {name: fields[name] for name in (*_CPU_FIELDS, *_ARM_FIELDS) if name in fields}
