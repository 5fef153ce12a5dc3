"""Compiles the CUDA kernels for the host: see scheduler.h."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

SHIM = Path(__file__).resolve().parent
CSRC = SHIM.parents[1] / "csrc"
CUDA = CSRC / "cuda"
COMPILER = os.environ.get("CXX", "g++")

_COMMON = ["-std=c++20", "-g1", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# A variable that is read before it is written holds a large number, not by chance a zero.
_KERNELS = [
    *("-DMETALORA_SHIM", f"-I{SHIM}", "-ftrivial-auto-var-init=pattern"),
]
SANITIZERS = {
    "none": ["-O1"],
    "thread": ["-O1", "-fsanitize=thread"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


class CompileError(Exception):
    pass


def has_compiler() -> bool:
    return shutil.which(COMPILER) is not None


def kernels() -> list[Path]:
    return sorted(CUDA.rglob("*.cu"))


def program(cache: Path, sources: Sequence[Path], sanitizer: str) -> Path:
    """A program of these sources."""
    flags = [*_COMMON, *_KERNELS, *SANITIZERS[sanitizer]]
    objects = _objects(cache, [*((source, flags) for source in sources), _scheduler()])
    return _link(cache, objects, SANITIZERS[sanitizer], "program")


def shared_library(cache: Path, sources: Sequence[Path]) -> Path:
    """A library of these sources for ctypes."""
    flags = [*_COMMON, *_KERNELS, *SANITIZERS["none"], "-fPIC"]
    objects = _objects(cache, [*((source, flags) for source in sources), _scheduler()])
    return _link(cache, objects, ["-shared"], "library.so")


def operators(cache: Path) -> Path:
    """A library that registers the CUDA operators for CPU tensors as torch.ops.metalora_shim."""
    from torch.utils import cpp_extension

    plain = [*_COMMON, *_KERNELS, *SANITIZERS["none"], "-fPIC"]
    bindings = [
        *("-std=c++20", "-O0", "-fPIC", f"-DTORCH_TARGET_VERSION={_torch_target()}"),
        *("-DMETALORA_SHIM", "-DMETALORA_LIBRARY=metalora_shim", "-DMETALORA_KEY=CPU"),
        *(f"-I{SHIM}", *(f"-isystem{path}" for path in cpp_extension.include_paths())),
    ]
    jobs = [(source, plain) for source in kernels()]
    jobs += [(SHIM / "blas.cpp", plain)]
    jobs += [(source, bindings) for source in [SHIM / "library.cpp", *sorted(CUDA.rglob("*.cpp"))]]
    folders = cpp_extension.library_paths()
    link = ["-shared", *(f"-L{p}" for p in folders), *(f"-Wl,-rpath,{p}" for p in folders)]
    libraries = ["-ltorch_cpu", "-ltorch", "-lc10"]
    return _link(cache, _objects(cache, [*jobs, _scheduler()]), [*link, *libraries], "operators.so")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a program, until a sanitizer's first report."""
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1 atexit_sleep_ms=0"}
    command = [str(program), *arguments]
    if shutil.which("setarch"):  # ThreadSanitizer cannot live with every random address
        command = ["setarch", "--addr-no-randomize", *command]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


def _scheduler() -> tuple[Path, list[str]]:
    return SHIM / "scheduler.cpp", [*_COMMON, "-O2", "-fPIC"]


def _torch_target() -> str:
    text = (CSRC.parent / "setup.py").read_text()
    return text.split("-DTORCH_TARGET_VERSION=")[1].split('"')[0]


def _objects(cache: Path, jobs: Sequence[tuple[Path, list[str]]]) -> list[Path]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: _compile(cache, *job), jobs))


def _compile(cache: Path, source: Path, flags: list[str]) -> Path:
    """The source's object file, under a name that its preprocessed text and the flags give it."""
    text = subprocess.run([COMPILER, *flags, *_language(source), "-E"], capture_output=True)
    key = _key(text.stdout.decode().replace(str(source.parent), ""), *flags)
    target = cache / f"{source.stem}-{key}.o"
    _make([COMPILER, *flags, *_language(source), "-c", "-o"], target)
    return target


def _language(source: Path) -> list[str]:
    return ["-x", "c++", str(source)]


def _link(cache: Path, objects: Sequence[Path], flags: list[str], name: str) -> Path:
    target = cache / f"{_key(*map(str, objects), *flags)}-{name}"
    libraries = [flag for flag in flags if flag.startswith("-l")]
    others = [flag for flag in flags if flag not in libraries]
    _make([COMPILER, *others, *map(str, objects), *libraries, "-ldl", "-o"], target)
    return target


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def _make(command: list[str], target: Path) -> None:
    """Makes a file unless it is there; of several processes that share the cache, one does."""
    with FileLock(f"{target}.lock"):
        if target.exists():
            return
        part = target.with_suffix(".part")
        done = subprocess.run([*command, str(part)], capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{' '.join(command)}\n{done.stderr[-4000:]}")
        part.replace(target)
