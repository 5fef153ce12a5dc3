"""The two backends of the trainers: native kernels and the reference."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from metalora._library import native_available
from metalora.ops import _trainings


@pytest.fixture(params=["native", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs a test on the native kernels and again on the reference."""
    if request.param == "native" and not native_available():
        pytest.skip("the native library is not built")
    if request.param == "reference":
        monkeypatch.setattr(_trainings, "usable", lambda tensor: False)
    return request.param
