"""The build modes: what each builds, and what it says."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


@pytest.mark.exhaustive
def test_none_is_pure_python(tmp_path: Path) -> None:
    (loaded, cpu_status, _), log = install("none", tmp_path)
    assert loaded == "False False"
    assert "METALORA_BUILD=none" in cpu_status
    assert "metalora: building no kernels (METALORA_BUILD=none)" in log
    _experiments_run_when_installed(tmp_path)
    _a_clone_without_libraries_is_named(tmp_path)


def _experiments_run_when_installed(folder: Path) -> None:
    run = subprocess.run(
        f"{sys.executable} -m experiments.synthetic linear --smoke --out run".split(),
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(folder / "target")},
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert (folder / "run" / "results.csv").exists()


def _a_clone_without_libraries_is_named(folder: Path) -> None:
    """Started in a clone, Python takes the clone's metalora, not the installed one."""
    clone, installed = folder / "source" / "metalora", folder / "target" / "metalora"
    (clone / "_C.stale.so").unlink()
    (installed / "_C.so").touch()
    run = subprocess.run(
        [sys.executable, "-c", "import metalora; print(metalora.build_info()['cpu'])"],
        capture_output=True,
        text=True,
        cwd=clone.parent,
        env=os.environ | {"PYTHONPATH": str(installed.parent)},
        timeout=120,
    )
    for text in (run.stdout, run.stderr):
        assert f"not built in {clone}, which Python imports instead of the installed" in text
        assert str(installed) in text
        assert "pip install --no-build-isolation --no-deps -e ." in text


@pytest.mark.exhaustive
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


def test_a_missing_torch_is_said_in_one_line(setup_module: ModuleType, monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "torch" else find(n))
    with pytest.raises(SystemExit, match=r"^metalora needs torch where it is built .*[^\n]$"):
        setup_module.choose("auto")
    assert setup_module.choose("none")[:2] == (False, False)


@pytest.mark.parametrize(
    ("requested", "kept"),
    [
        (None, "8.0;9.0+PTX"),
        ("", "8.0;9.0+PTX"),
        ("8.6", "8.6"),
        ("8.0 9.0+PTX", "8.0;9.0+PTX"),
        ("8.0;8.0;9.0a", "8.0;9.0a"),
        ("10.0f;12.1+PTX", "10.0f;12.1+PTX"),
        ("Hopper", "9.0+PTX"),
        ("Ampere;Ada", "8.0;8.6+PTX;8.9+PTX"),
        ("Ampere+Tegra", "8.7"),
        ("All", "8.0;9.0+PTX"),
    ],
)
def test_architectures_become_numbers(setup_module: ModuleType, requested, kept: str) -> None:
    assert setup_module.architectures(requested) == (kept, "")


@pytest.mark.parametrize(
    ("requested", "kept", "went"),
    [
        ("7.5;8.0", "8.0", "7.5"),
        ("7.0 7.5+PTX 9.0", "9.0", "7.0, 7.5+PTX"),
        ("Turing;Hopper", "9.0+PTX", "Turing"),
        ("7.5", "", "7.5"),
        ("Hoper", "", "Hoper"),
    ],
)
def test_older_and_unknown_architectures_are_left_out_by_name(
    setup_module: ModuleType, requested: str, kept: str, went: str
) -> None:
    said = f"of TORCH_CUDA_ARCH_LIST={requested!r} these are not 8.0 or newer: {went}"
    assert setup_module.architectures(requested) == (kept, said)


def test_native_is_this_machine(setup_module: ModuleType, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (7, 5), (9, 0)].__getitem__)
    kept, said = setup_module.architectures("native")
    assert kept == "9.0+PTX"
    assert said.endswith("not 8.0 or newer: native")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert setup_module.architectures("native")[0] == ""


def test_an_older_architecture_does_not_end_an_auto_build(
    setup_module: ModuleType, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(setup_module, "find_toolkit", lambda version: (tmp_path, "found"))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;Hopper")
    cpu, cuda, why = setup_module.choose("auto")
    assert (cpu, cuda) == (True, True)
    assert why.startswith("found; of TORCH_CUDA_ARCH_LIST='7.5;Hopper' these are not 8.0 or newer")
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    assert setup_module.choose("auto")[:2] == (True, False)
    with pytest.raises(SystemExit, match=r"METALORA_BUILD=cuda cannot be done: .*: 7\.5$"):
        setup_module.choose("cuda")


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

    def test_headers_may_be_where_conda_has_them(self, setup_module, monkeypatch, tmp_path) -> None:
        root = self.fake(tmp_path / "conda", "13.0", header=False)
        headers = root / "targets" / "x86_64-linux" / "include"
        headers.mkdir(parents=True)
        (headers / "cuda_runtime.h").touch()
        assert self.find(setup_module, monkeypatch, root, "13.0")[0] == root
        assert setup_module.headers_of(root) == headers

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
        with pytest.raises(SystemExit, match=r"METALORA_BUILD=cpu cannot be done: no C\+\+ compil"):
            setup_module.choose("cpu")

    def test_nor_with_one_that_does_not_work(self, setup_module, monkeypatch) -> None:
        for compiler in ("/bin/false", "no-such-compiler"):
            monkeypatch.setenv("CXX", compiler)
            cpu, cuda, why = setup_module.choose("auto")
            assert not cpu and not cuda
            assert f"{compiler!r} compiles no C++20; install g++ 11 or set CXX" in why
            with pytest.raises(SystemExit, match="cannot be done"):
                setup_module.choose("cpu")

    def test_nor_without_the_headers_of_python(self, setup_module, monkeypatch, tmp_path) -> None:
        monkeypatch.setattr(setup_module.sysconfig, "get_path", lambda name: str(tmp_path))
        assert "install python3-dev" in setup_module.choose("auto")[2]


class TestSetUp:
    """The Makefile, the lock file and pyproject.toml say the same."""

    def locked(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for line in (ROOT / "requirements.lock").read_text().splitlines():
            if not line.startswith("#"):
                name, _, version = line.partition(";")[0].strip().partition("==")
                assert version, f"{line!r} is not exact"
                found.setdefault(name, []).append(version)
        return found

    def requirements(self) -> list[Requirement]:
        """What pyproject.toml asks for, with its extras."""
        tomllib = pytest.importorskip("tomllib")  # Python 3.11
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        extras = project["project"]["optional-dependencies"]
        texts = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
        texts += [text for extra in extras.values() for text in extra]
        return [Requirement(text) for text in texts if not text.startswith("metalora[")]

    def test_lock_has_everything_in_range(self) -> None:
        locked = self.locked()
        for wanted in self.requirements():
            name = canonicalize_name(wanted.name)
            assert name in locked
            assert all(wanted.specifier.contains(v) for v in locked[name]), name

    def test_installed_is_what_is_locked(self) -> None:
        """Where `make` made this environment; others may have what the ranges allow."""
        if Path(sys.prefix) != ROOT / ".venv":
            pytest.skip("this environment is not make's")
        locked = self.locked()
        for wanted in self.requirements():
            assert version(wanted.name) in locked[canonicalize_name(wanted.name)]

    def test_build_needs_the_same_everywhere(self) -> None:
        tomllib = pytest.importorskip("tomllib")  # Python 3.11
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        wanted = sorted(map(str, map(Requirement, project["build-system"]["requires"])))
        for file, pattern in (
            ("Makefile", r"^BUILD := (.*)$"),
            ("README.md", r"^    pip install (\"torch.*)$"),
        ):
            (line,) = re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)
            assert sorted(map(str, map(Requirement, shlex.split(line)))) == wanted, file

    def test_make_says_what_is_missing(self, tmp_path: Path) -> None:
        if shutil.which("make") is None:
            pytest.skip("no make")
        for name in ("find", "sh"):
            (tmp_path / name).symlink_to(str(shutil.which(name)))

        def check(*arguments: str, **environment: str) -> str:
            variables = {k: v for k, v in os.environ.items() if k not in ("CXX", "METALORA_BUILD")}
            return subprocess.run(
                [str(shutil.which("make")), "--silent", "check-machine", *arguments],
                cwd=ROOT,
                env=variables | environment,
                capture_output=True,
                text=True,
            ).stderr.splitlines()[0]

        python = f"PYTHON={sys.executable}"
        assert "no C++ compiler was found; install g++" in check(python, PATH=str(tmp_path))
        assert "is for Python 3.10 to 3.14, and /bin/false is not" in check("PYTHON=/bin/false")
