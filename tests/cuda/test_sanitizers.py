"""Every launcher on small problems, under the sanitizers; and what happens without a barrier."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.shim import build

pytestmark = pytest.mark.exhaustive

BARRIER = re.compile(r"__sync(threads|warp)\([^()]*\);")


@pytest.fixture(scope="module")
def launchers(cache: Path) -> Callable[[str], Path]:
    """The program of all launchers, by sanitizer."""
    sources = [*sorted(build.SHIM.glob("launchers*.cpp")), *build.kernels()]
    sources += [build.CUDA / "tuning.cpp"]
    return functools.cache(lambda sanitizer: build.program(cache, sources, sanitizer))


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
@pytest.mark.parametrize("kernel", [path.stem for path in build.kernels()])
def test_launchers(launchers: Callable[[str], Path], sanitizer: str, kernel: str) -> None:
    done = build.run(launchers(sanitizer), kernel)
    assert done.returncode == 0, done.stderr[-5000:]


def barriers() -> list[tuple[str, int]]:
    """(file, line) of every barrier in csrc/cuda."""
    files = [f for f in sorted(build.CUDA.rglob("*")) if f.suffix in (".cu", ".h")]
    return [
        (file.name, line)
        for file in files
        for line, text in enumerate(file.read_text().splitlines(), start=1)
        if BARRIER.search(text)
    ]


@pytest.mark.parametrize(("file", "line"), barriers())
def test_removed_barrier_is_found(
    launchers: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, file: str, line: int
) -> None:
    monkeypatch.setenv("METALORA_SHIM_WITHOUT_BARRIER", f"{file}:{line}")
    users = [p for p in build.kernels() if p.name == file or f'{file}"' in p.read_text()]
    assert any(build.run(launchers("thread"), user.stem).returncode for user in users)
