"""Runs the operators' tests on a library with AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/sanitize.py [pytest arguments; default: tests/ops]

Before that a library with planted bugs shows that either sanitizer ends the process.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "sanitize"
# The report comes before the process ends by it; torch and Python never free all that they have.
FLAGS = "-g1 -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
PLANTED = """
#include <cstdint>
#include <vector>
extern "C" int64_t out_of_bounds(int64_t n) { std::vector<char> v(n); return *(v.data() + n); }
extern "C" int64_t overflow(int64_t n) { return INT64_MAX + n; }
"""
FOUND = {"out_of_bounds": "heap-buffer-overflow", "overflow": "signed integer overflow"}


def compiler() -> str:
    return os.environ.get("CXX") or shutil.which("g++") or "c++"


def environment() -> dict[str, str]:
    """The variables of a process that loads libraries with sanitizers into an ordinary Python."""
    libraries = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so")
    ]
    return {**os.environ, **OPTIONS, "LD_PRELOAD": ":".join(libraries), "OMP_NUM_THREADS": "2"}


def find_planted() -> None:
    """Checks that both sanitizers are at work."""
    source, library = FOLDER / "planted.cpp", FOLDER / "planted.so"
    source.write_text(PLANTED)
    subprocess.run(
        [compiler(), *FLAGS.split(), "-shared", "-fPIC", source, "-o", library], check=True
    )
    for function, report in FOUND.items():
        call = f"import ctypes; ctypes.CDLL({str(library)!r}).{function}(ctypes.c_int64(9))"
        done = subprocess.run(
            [sys.executable, "-c", call], capture_output=True, text=True, env=environment()
        )
        if done.returncode == 0 or report not in done.stderr:
            sys.exit(f"the sanitizers have missed a planted {report}:\n{done.stderr[-2000:]}")
        print(f"planted {report}: found", flush=True)


def build() -> Path:
    """Builds the CPU library with sanitizers beside a copy of the package; returns the folder."""
    copy = FOLDER / "source"
    kept = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "metalora", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=kept, dirs_exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    # The last optimisation level counts; with -O3 the sanitizers' checks take minutes to compile.
    flags = f"{FLAGS} -O1"
    wrapper = FOLDER / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler()} "$@" {flags}\n')
    wrapper.chmod(0o755)
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=copy,
        env={**os.environ, "METALORA_BUILD": "cpu", "CXX": str(wrapper)},
        check=True,
    )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    if not (copy / "metalora" / f"_C{suffix}").exists():
        sys.exit(f"no library was built in {copy / 'metalora'}")
    return copy


def main() -> None:
    shutil.rmtree(FOLDER / "source" / "metalora", ignore_errors=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    find_planted()
    copy = build()
    check = (
        "import metalora; print('CPU library:', metalora.build_info()['cpu'], metalora.__file__)"
    )
    subprocess.run([sys.executable, "-c", check], cwd=copy, env=environment(), check=True)
    given = sys.argv[1:] or ["tests/ops"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
    sys.exit(subprocess.run([*pytest, *given], cwd=copy, env=environment()).returncode)


if __name__ == "__main__":
    main()
