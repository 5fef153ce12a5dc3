"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process per core, and so a thread per process
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from metalora._library import native_available


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.default_generator.manual_seed(0)  # without a GPU's, which takes milliseconds


@pytest.fixture
def native() -> None:
    """For tests of the native kernels themselves."""
    if not native_available():
        pytest.skip("the native CPU library is not loaded")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that stands beside a developer's checkout."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real data beside this checkout (../shared/data)")
    return folder
