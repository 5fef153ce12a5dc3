"""The kernels of every instruction set that this CPU has; the other tests run the best one's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import metalora

ALL = ("portable", "avx2", "avx512", "avx512_bf16")
HERE = Path(__file__).parent


def lesser() -> list[str]:
    best = metalora.build_info().get("best instructions")
    return list(ALL[: ALL.index(best)]) if best else []


def run(instructions: str, *command: str) -> str:
    environment = {**os.environ, "METALORA_CPU_ISA": instructions}
    for name in [name for name in environment if name.startswith("PYTEST_")]:
        del environment[name]
    done = subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("instructions", lesser())
def test_the_variable_chooses(instructions: str) -> None:
    code = "import metalora; print(metalora.build_info()['instructions'])"
    assert run(instructions, "-c", code).strip() == instructions


@pytest.mark.slow
@pytest.mark.parametrize("instructions", lesser())
def test_operators(instructions: str) -> None:
    modules = ("test_lora_linear", "test_merge_lora", "test_task_matvec", "test_dropout")
    files = [str(HERE / f"{name}.py") for name in modules]
    options = ("-q", "--numprocesses", "0", "-m", "not slow and not exhaustive and not gpu")
    assert " passed" in run(instructions, "-m", "pytest", *options, *files)
