"""Builds of the CUDA kernels for the host, kept between runs of the tests."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from metalora._library import cuda_status, native_available
from metalora.ops import _native
from tests.cuda.places import shim_table
from tests.shim import build


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    if not build.has_compiler():
        pytest.skip(f"the shim needs a C++20 compiler; {build.COMPILER} was not found")
    return Path(request.config.cache.mkdir("metalora_shim"))


@pytest.fixture(scope="session")
def shim_operators(cache: Path) -> Any:
    """torch.ops.metalora_shim: the CUDA operators for CPU tensors."""
    torch.ops.load_library(str(build.operators(cache)))
    return torch.ops.metalora_shim


@pytest.fixture
def asked(cache: Path, shim_operators: Any) -> Callable[[], list[tuple[str, tuple[int, ...]]]]:
    """Returns what the operators asked of the GPU since the last call, in order.

    The names of kernels, without template arguments, and of torch's products with their sizes.
    """
    library = ctypes.CDLL(str(build.operators(cache)))
    library.metalora_shim_record.restype = ctypes.c_char_p
    library.metalora_shim_clear_record()

    def take() -> list[tuple[str, tuple[int, ...]]]:
        lines = library.metalora_shim_record().decode().splitlines()
        library.metalora_shim_clear_record()
        return [_call(line) for line in lines]

    return take


def _call(line: str) -> tuple[str, tuple[int, ...]]:
    kernel = re.fullmatch(r"\(?(\w+_kernel)(<.*>)?\)?", line)
    if kernel:
        return kernel[1], ()
    name, *sizes = line.split()
    return name, tuple(map(int, sizes))


@pytest.fixture(params=["shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the tensors of a test of CUDA code are: on a GPU, or on the CPU for the shim."""
    if request.param == "cuda":
        assert native_available("cuda"), cuda_status
        return torch.device("cuda")
    for name, operator in shim_table(request.getfixturevalue("shim_operators")).items():
        monkeypatch.setitem(_native._raw, name, operator)
    return torch.device("cpu")
