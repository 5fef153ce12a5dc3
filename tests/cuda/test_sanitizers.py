"""Every launcher on small problems, under the sanitizers; and what happens without a barrier."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.shim import build

pytestmark = pytest.mark.exhaustive

BARRIER = re.compile(r"__sync(threads|warp)\([^()]*\);")


def launchers(cache: Path, kernels: Path, sanitizer: str) -> Path:
    sources = [*sorted(build.SHIM.glob("launchers*.cpp")), *build.kernels(kernels)]
    sources += [build.CUDA / "tuning.cpp"]
    return build.program(cache, sources, sanitizer)


@pytest.fixture(scope="module", params=["thread", "address"])
def sanitized(cache: Path, request: pytest.FixtureRequest) -> Path:
    return launchers(cache, build.CUDA, request.param)


@pytest.mark.parametrize("kernel", [path.stem for path in build.kernels()])
def test_launchers(sanitized: Path, kernel: str) -> None:
    done = build.run(sanitized, kernel)
    assert done.returncode == 0, done.stderr[-5000:]


def barriers() -> list[tuple[str, int]]:
    """(file, n) for every barrier in csrc/cuda."""
    files = [f for f in sorted(build.CUDA.rglob("*")) if f.suffix in (".cu", ".h")]
    return [
        (str(f.relative_to(build.CUDA)), n)
        for f in files
        for n, _ in enumerate(BARRIER.finditer(f.read_text()))
    ]


@pytest.mark.parametrize(("file", "n"), barriers())
def test_removed_barrier_is_found(cache: Path, tmp_path: Path, file: str, n: int) -> None:
    kernels = Path(shutil.copytree(build.CSRC, tmp_path, dirs_exist_ok=True)) / "cuda"
    text = (kernels / file).read_text()
    removed = list(BARRIER.finditer(text))[n]
    (kernels / file).write_text(text[: removed.start()] + ";" + text[removed.end() :])
    program = launchers(cache, kernels, "thread")
    name = Path(file).name
    users = [p for p in build.kernels(kernels) if p.name == name or f'{name}"' in p.read_text()]
    assert any(build.run(program, user.stem).returncode for user in users)
