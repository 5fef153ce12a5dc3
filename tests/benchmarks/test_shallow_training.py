"""The benchmark of the shallow network: its gates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import shallow_training
from benchmarks.lib.cases import PRECISIONS, Case, Options
from benchmarks.lib.gate import GateError
from benchmarks.shallow_training import BENCHMARK, VERSIONS

pytestmark = pytest.mark.slow

CASES = BENCHMARK.select(["cpu"])
OPTIONS = Options(VERSIONS)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shallow_training, "SAMPLES", 30)
    monkeypatch.setattr(shallow_training, "FEW", 12)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_version_trains_as_the_reference(case: Case) -> None:
    make = replace(case, trainings=2).candidates(PRECISIONS["fp32"], OPTIONS)
    for name in VERSIONS:
        assert 0 <= make(name).error < 1e-5


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("position", [0, 1])  # learning rate, weight decay
def test_the_gate_finds_a_wrong_version(
    case: Case, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = list(shallow_training.ADAMW)
    wrong[position] *= 2
    monkeypatch.setattr(shallow_training, "ADAMW", tuple(wrong))
    make = replace(case, trainings=2).candidates(PRECISIONS["fp32"], OPTIONS)
    assert make("metalora").error < 1e-5
    with pytest.raises(GateError, match="loop has a relative error"):
        make("loop")


def test_times_are_of_one_training() -> None:
    make = CASES[0].candidates(PRECISIONS["fp32"], OPTIONS)
    assert make("metalora").scales == {"train": 40000 / 400 / 10}
    assert make("loop").scales == {"train": 40000 / 10}
    assert make("columns").scales == {"train": 40000 / 10 / 10}
