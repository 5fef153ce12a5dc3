"""The build modes: what each builds, and what it says."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

USE = """
import torch, metalora
from metalora import _library, ops
x, w = torch.randn(9, 5, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
A, B = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
y = ops.lora_linear(x, w, None, A, B, torch.tensor([0, 4, 9]))
wanted = torch.cat([x[:4] @ (w + B[0] @ A[0]).T, x[4:] @ (w + B[1] @ A[1]).T])
torch.testing.assert_close(y, wanted)
print(metalora.__file__)
print(_library.native_available(), _library.native_available("cuda"))
print(_library.cpu_status)
print(_library.cuda_status)
"""


@pytest.fixture
def setup_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    for name in ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))  # restored afterwards
        monkeypatch.delenv(name)
    spec = importlib.util.spec_from_file_location("metalora_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unoptimised(folder: Path) -> dict[str, str]:
    """The environment of a build without optimisation, which takes a third of the time.

    What this environment was installed with, and all other tests use, is optimised.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++") or "g++"
    wrapper = folder / "c++"
    wrapper.write_text(f'#!/bin/sh\nexec {compiler} "$@" -O0\n')
    wrapper.chmod(0o755)
    return {"CXX": str(wrapper)}


def install(
    mode: str, tmp_path: Path, variables: Mapping[str, str] | None = None
) -> tuple[list[str], str]:
    """Installs a copy of the sources in this mode; returns what USE prints, and the build's log."""
    source = tmp_path / "source"
    shutil.copytree(
        ROOT,
        source,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", "build", "*.so", "runs", "*.egg-info", "__pycache__", ".*_cache"
        ),
    )
    (source / "metalora" / "_C.stale.so").touch()  # as an earlier build in place leaves it
    target = tmp_path / "target"
    environment = os.environ | {"METALORA_BUILD": mode, **(variables or {})}
    build = subprocess.run(
        [
            *f"{sys.executable} -m pip install -v --no-deps --no-build-isolation".split(),
            "--target",
            str(target),
            str(source),
        ],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    assert build.returncode == 0, build.stdout[-3000:] + build.stderr[-3000:]
    run = subprocess.run(
        [sys.executable, "-c", USE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0].startswith(str(target))
    assert not list((target / "metalora").rglob("*.cpp"))
    assert not (target / "metalora" / "_C.stale.so").exists()
    return lines[1:], build.stdout + build.stderr


def test_none_is_pure_python(tmp_path: Path) -> None:
    (loaded, cpu_status, _), log = install("none", tmp_path)
    assert loaded == "False False"
    assert "METALORA_BUILD=none" in cpu_status
    assert "metalora: building no kernels (METALORA_BUILD=none)" in log


@pytest.mark.slow
def test_cpu_builds_the_cpu_library_only(tmp_path: Path) -> None:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (loaded, cpu_status, cuda_status), log = install("cpu", tmp_path, unoptimised(tmp_path))
    assert loaded == "True False"
    assert cpu_status == "loaded"
    assert "not built" in cuda_status or "has no CUDA" in cuda_status
    assert "metalora: building CPU kernels (METALORA_BUILD=cpu)" in log


def test_auto_built_what_this_machine_can(setup_module: ModuleType) -> None:
    """This environment was installed with METALORA_BUILD=auto, unless someone chose otherwise."""
    from metalora import _library

    if os.environ.get("METALORA_BUILD", "auto") != "auto" or not _library.native_available():
        pytest.skip("this environment was not built with METALORA_BUILD=auto")
    cpu, cuda, why = setup_module.choose("auto")
    assert cpu
    assert why
    if cuda and "not built" not in _library.cuda_status:
        assert _library.native_available("cuda"), _library.cuda_status


def test_unknown_mode_is_refused(setup_module: ModuleType) -> None:
    with pytest.raises(SystemExit, match="METALORA_BUILD must be one of auto, cpu, cuda, none"):
        setup_module.choose("gpu")


class TestToolkit:
    def fake(self, root: Path, release: str, header: bool = True) -> Path:
        (root / "bin").mkdir(parents=True)
        (root / "include").mkdir()
        nvcc = root / "bin" / "nvcc"
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}'\n"
        )
        nvcc.chmod(0o755)
        if header:
            (root / "include" / "cuda_runtime.h").touch()
        return root

    def find(self, module: ModuleType, monkeypatch, home: Path, version: str):
        monkeypatch.setenv("CUDA_HOME", str(home))
        monkeypatch.setenv("PATH", "/nowhere")
        monkeypatch.setattr(module, "DEFAULT_TOOLKIT", "/nowhere")
        return module.find_toolkit(version)

    def test_same_major_version_is_taken(self, setup_module, monkeypatch, tmp_path) -> None:
        root = self.fake(tmp_path / "cuda", "13.0")
        found, why = self.find(setup_module, monkeypatch, root, "13.2")
        assert found == root
        assert "13.0 found for torch's 13.2" in why

    def test_another_major_version_is_not(self, setup_module, monkeypatch, tmp_path) -> None:
        root = self.fake(tmp_path / "cuda", "12.8")
        found, why = self.find(setup_module, monkeypatch, root, "13.0")
        assert found is None
        assert "found only 12.8" in why

    def test_a_toolkit_without_headers_is_not(self, setup_module, monkeypatch, tmp_path) -> None:
        root = self.fake(tmp_path / "cuda", "13.0", header=False)
        assert self.find(setup_module, monkeypatch, root, "13.0")[0] is None

    def test_cuda_mode_without_a_toolkit_says_why(self, setup_module, monkeypatch) -> None:
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(setup_module, "find_toolkit", lambda version: (None, "we found none"))
        with pytest.raises(SystemExit, match="METALORA_BUILD=cuda cannot be done: we found none"):
            setup_module.choose("cuda")
        cpu, cuda, why = setup_module.choose("auto")
        assert (cpu, cuda, why) == (True, False, "we found none")

    def test_without_a_compiler_auto_is_pure_python(self, setup_module, monkeypatch) -> None:
        monkeypatch.delenv("CXX", raising=False)
        monkeypatch.setattr(setup_module.shutil, "which", lambda name: None)
        cpu, cuda, why = setup_module.choose("auto")
        assert not cpu and not cuda
        assert "no C++ compiler" in why
        with pytest.raises(SystemExit, match=r"needs a C\+\+20 compiler"):
            setup_module.choose("cpu")
