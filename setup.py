"""Builds the native libraries; everything else about the package stands in pyproject.toml.

METALORA_BUILD chooses what is built:
    auto  (default) CPU kernels, and CUDA kernels where torch has CUDA and a toolkit of the same
          major version is found; pure Python where no C++ can be compiled
    cpu   CPU kernels only
    cuda  CPU and CUDA kernels; an error where that cannot be
    none  pure Python: every operator runs on metalora.reference
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
# The oldest torch whose stable ABI is used: 2.11.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# PTX of 9.0 and not of 9.0a, which no newer GPU runs.
ARCHITECTURES = "8.0;9.0+PTX"
NVCC_FLAGS = ["-O3", "-std=c++20", "-lineinfo", TORCH_TARGET, "-DUSE_CUDA"]
DEFAULT_TOOLKIT = "/usr/local/cuda"


def headers_of(toolkit: Path) -> Path | None:
    """Where the toolkit has its headers; those of conda are not in its include."""
    places = (toolkit / "include", *sorted(toolkit.glob("targets/*/include")))
    return next((place for place in places if (place / "cuda_runtime.h").exists()), None)


def find_toolkit(torch_cuda: str) -> tuple[Path | None, str]:
    """The root of a CUDA toolkit with torch's major CUDA version, or None, and why."""
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), DEFAULT_TOOLKIT]
    nvcc = shutil.which("nvcc")
    if nvcc:
        places.append(str(Path(nvcc).resolve().parent.parent))
    seen = []
    for place in dict.fromkeys(p for p in places if p):
        compiler = Path(place) / "bin" / "nvcc"
        if not compiler.exists() or headers_of(Path(place)) is None:
            continue
        text = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
        match = re.search(r"release (\d+)\.(\d+)", text)
        if match and match[1] == torch_cuda.split(".")[0]:
            return Path(place), f"CUDA toolkit {match[1]}.{match[2]} found for torch's {torch_cuda}"
        seen.append(f"{match[1]}.{match[2]}" if match else "an unknown version")
    found = f"found only {', '.join(seen)}" if seen else "found none"
    return None, f"torch was built with CUDA {torch_cuda} but of matching CUDA toolkits we {found}"


def compiler_problem() -> str | None:
    """Why C++20 for Python cannot be compiled here and what to do, or None where it can."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++"))), None)
    if compiler is None:
        return "no C++ compiler was found; install g++ or set CXX"
    command = [*shlex.split(compiler), "-std=c++20", "-fsyntax-only", "-x", "c++", "-"]
    command.append(f"-I{sysconfig.get_path('include')}")
    for program, problem in (
        ("#include <version>", f"{compiler!r} compiles no C++20; install g++ 11 or set CXX"),
        ("#include <Python.h>", "Python's headers are missing; install python3-dev"),
    ):
        try:
            subprocess.run(command, input=program, text=True, capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return problem
    return None


def architectures(requested: str | None) -> tuple[str, str]:
    """TORCH_CUDA_ARCH_LIST in numbers and without what these kernels cannot run on, and what went.

    Names are those that torch knows ("Hopper"), "native" for the GPUs of this machine, and "All".
    """
    names = {
        "All": ARCHITECTURES,
        "Ampere": "8.0;8.6+PTX",
        "Ampere+Tegra": "8.7",
        "Ada": "8.9+PTX",
        "Hopper": "9.0+PTX",
        "Blackwell": "10.0;10.3;12.0;12.1+PTX",
        "Blackwell+Tegra": "11.0",
        "Rubin": "10.7+PTX",
    }
    kept, left_out = [], []
    for entry in re.split(r"[;, ]+", (requested or ARCHITECTURES).strip("; ,")):
        if entry == "native":
            from torch import cuda

            found = map(cuda.get_device_capability, range(cuda.device_count()))
            numbers = ";".join(f"{major}.{minor}+PTX" for major, minor in sorted(set(found)))
        else:
            numbers = names.get(entry, entry)
        for number in numbers.split(";"):
            match = re.fullmatch(r"(\d+)\.\d[af]?(\+PTX)?", number)
            if match and int(match[1]) >= 8:  # the kernels copy by cp.async
                kept.append(number)
            else:
                left_out.append(entry)
    went = ", ".join(dict.fromkeys(left_out))
    said = f"of TORCH_CUDA_ARCH_LIST={requested!r} these are not 8.0 or newer: {went}"
    return ";".join(dict.fromkeys(kept)), said if went else ""


def choose(mode: str) -> tuple[bool, bool, str]:
    """(build the CPU library, build the CUDA library, why)."""
    if mode not in MODES:
        sys.exit(f"METALORA_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "none":
        return False, False, "METALORA_BUILD=none"
    missing = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(
            f"metalora needs {' and '.join(missing)} where it is built without isolation; install "
            "them first, as the README says, or set METALORA_BUILD=none for pure Python"
        )
    problem = compiler_problem()
    if problem:
        if mode != "auto":
            sys.exit(f"METALORA_BUILD={mode} cannot be done: {problem}")
        return False, False, f"{problem} for native kernels"
    if mode == "cpu":
        return True, False, "METALORA_BUILD=cpu"
    import torch

    if torch.version.cuda is None:
        why = "this torch has no CUDA"
        toolkit = None
    else:
        toolkit, why = find_toolkit(torch.version.cuda)
    listed = ""
    if toolkit is not None:
        listed, left_out = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"))
        why = "; ".join(filter(None, (why, left_out)))
        toolkit = toolkit if listed else None
    if toolkit is None and mode == "cuda":
        sys.exit(f"METALORA_BUILD=cuda cannot be done: {why}")
    if toolkit is not None:
        os.environ["CUDA_HOME"] = str(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = listed
    return True, toolkit is not None, why


def sources(folder: str, pattern: str) -> list[str]:
    return sorted(map(str, Path(folder).rglob(pattern)))


def extensions(cuda: bool) -> list[Any]:
    import pybind11
    import torch
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    # Fused multiply-adds and `omp simd` reductions are asked for by name; fast-math is not.
    cxx = ["-O3", "-std=c++20", "-ffp-contract=fast", "-fopenmp-simd", "-fvisibility=hidden"]
    # Without the debug information that Python's own flags ask for: objects are a seventh as large,
    # and made in three quarters of the time.
    cxx += ["-Wall", "-g0", TORCH_TARGET]
    version = f'-DMETALORA_TORCH_VERSION="{torch.__version__}"'
    built = [
        CppExtension(
            "metalora._C",
            ["csrc/library.cpp", *sources("csrc/cpu", "*.cpp")],
            include_dirs=[pybind11.get_include()],
            extra_compile_args={"cxx": [*cxx, version]},
        )
    ]
    if cuda:
        headers = headers_of(Path(os.environ["CUDA_HOME"]))
        architectures = f'-DMETALORA_ARCHITECTURES="{os.environ["TORCH_CUDA_ARCH_LIST"]}"'
        built.append(
            CUDAExtension(
                "metalora._C_cuda",
                [*sources("csrc/cuda", "*.cpp"), *sources("csrc/cuda", "*.cu")],
                include_dirs=[str(headers)] if headers else [],
                extra_compile_args={
                    "cxx": [*cxx, "-DUSE_CUDA", architectures],
                    "nvcc": NVCC_FLAGS,
                },
            )
        )
    return built


def main() -> None:
    mode = os.environ.get("METALORA_BUILD", "auto")
    cpu, cuda, why = choose(mode)
    built = " and ".join(["CPU"] * cpu + ["CUDA"] * cuda) or "no"
    print(f"metalora: building {built} kernels ({why})", file=sys.stderr)
    arguments: dict[str, Any] = {}
    if cpu:
        os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))
        from torch.utils.cpp_extension import BuildExtension

        arguments["ext_modules"] = extensions(cuda)
        arguments["cmdclass"] = {"build_ext": BuildExtension}
    setup(**arguments)


if __name__ == "__main__":
    main()
