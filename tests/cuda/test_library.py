"""Which file of a library is loaded."""

from __future__ import annotations

from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from metalora._library import _built


def test_the_library_of_another_python_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "_C_cuda.cpython-300-x86_64-linux-gnu.so").touch()
    (tmp_path / "_C_cuda.cpython-300-x86_64-linux-gnu.pyd").touch()
    assert _built("_C_cuda", tmp_path) is None
    own = tmp_path / f"_C_cuda{EXTENSION_SUFFIXES[0]}"
    own.touch()
    assert _built("_C_cuda", tmp_path) == own
    assert _built("_C", tmp_path) is None
