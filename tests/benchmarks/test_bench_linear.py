"""The benchmark of the linear model: its gates, what it scales up, and the table it writes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import bench_linear
from benchmarks.bench_linear import LIBRARIES, LoopProblem, Row
from experiments.synthetic.linear.settings import LinearSettings

SETTINGS = LinearSettings()
POINTS = {point.name: point for point in SETTINGS.points()}


def small(name: str, settings: LinearSettings = SETTINGS) -> LoopProblem:
    point = dataclasses.replace(POINTS[name], retrain_samples=60, finetune_samples=20)
    return LoopProblem(point, settings)


@pytest.mark.parametrize("name", ["T=2", "k=3", "d=5"])
def test_looping_through_the_samples_gives_the_native_iterates(name: str) -> None:
    small(name).check()


@pytest.mark.parametrize(
    ("rate", "algorithm"),
    [("INNER_LR", "LoRA-ML"), ("OUTER_LR", "LoRA-ML"), ("FINETUNE_LR", "fine-tuning")],
)
def test_the_gate_finds_a_wrong_version(
    rate: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_linear, rate, 1.01 * getattr(bench_linear, rate))
    with pytest.raises(AssertionError, match=f"numpy, {algorithm}, T=3: "):
        small("T=3").check()


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_time_is_scaled_to_all_steps_and_trials(
    library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(100))  # a second for every reading: each algorithm's few steps take one
    monkeypatch.setattr(bench_linear.time, "perf_counter", lambda: next(clock))
    settings = LinearSettings(trials=7, outer_steps=1000, finetune_steps=100)
    point = settings.points()[0]
    problem = LoopProblem(dataclasses.replace(point, retrain_samples=9), settings)
    # A training of either method, and a fine-tuning after each.
    assert problem.seconds(library) == 7 * (1000 + 1000 + 2 * 100) / bench_linear.SHORT


def test_the_table_is_written_with_the_ratio_to_each_groups_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        Row("one", "native", 1, 0.005, 0.004, 0.006, 21),
        Row("one", "numpy", 1, 20.0, 19.0, 21.0, 3, "scaled"),
        Row("two", "native", 2, 3.0, 2.0, 4.0, 3),
    ]
    bench_linear.report(rows, tmp_path / "results")
    text = (tmp_path / "results" / "linear.md").read_text()
    assert text in capsys.readouterr().out
    assert (
        "| one | numpy | 1 | 20.00 s | 19.00 s | 21.00 s | 3 | 4,000.0x | scaled |"
        in text.splitlines()
    )
    assert "| two | native | 2 | 3.00 s | 2.00 s | 4.00 s | 3 | 1.0x |  |" in text.splitlines()
    data = json.loads((tmp_path / "results" / "linear.json").read_text())
    assert [Row(**row) for row in data["rows"]] == rows
