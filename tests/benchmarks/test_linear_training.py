"""The benchmark of the linear model: its gates, and what it scales up."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import linear_training
from benchmarks.lib.cases import PRECISIONS, Options
from benchmarks.lib.gate import GateError
from benchmarks.linear_training import BENCHMARK, LOOPS, METHODS, Figure1Case, Problem
from experiments.synthetic.linear.settings import LinearSettings

pytestmark = pytest.mark.slow

POINTS = {point.name: point for point in LinearSettings().points()}
FP64 = PRECISIONS["fp64"]
OPTIONS = Options(("metalora", *LOOPS))


@pytest.mark.parametrize("name", ["T=2", "k=3", "d=5"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("library", LOOPS)
def test_looping_through_the_samples_gives_the_native_iterates(
    name: str, method: str, library: str
) -> None:
    point = dataclasses.replace(POINTS[name], retrain_samples=60, finetune_samples=20)
    problem = Problem(point, 1, torch.float64)
    found, exact = problem.loop(method, library, 5), problem.metalora(method, 5)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("rate", "method"),
    [("INNER_LR", "lora_ml"), ("OUTER_LR", "standard"), ("FINETUNE_LR", "finetune_lora")],
)
def test_the_gate_finds_a_wrong_version(
    rate: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(c for c in BENCHMARK.cases if c.operator == f"linear.{method}")
    make = case.candidates(FP64, OPTIONS)
    assert make("metalora").error < 1e-12 and make("samples-PyTorch").error < 1e-12
    monkeypatch.setattr(linear_training, rate, 1.01 * getattr(linear_training, rate))
    with pytest.raises(GateError, match="samples-numpy has a relative error"):
        make("samples-numpy")


def test_times_are_scaled_to_all_steps_of_one_training() -> None:
    one, many = (c for c in BENCHMARK.select(["cpu"]) if c.operator == "linear.lora_ml")
    assert one.candidates(FP64, OPTIONS)("samples-numpy").scales == {"train": 3000 / 5}
    make = many.candidates(FP64, OPTIONS)
    assert make("metalora").scales == {"train": 1 / 64}
    assert make("reference").scales == {"train": 3000 / 50 / 64}


def test_figure_1_is_scaled_to_all_steps_and_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LinearSettings(trials=7, outer_steps=1000, finetune_steps=100)
    monkeypatch.setattr(
        LinearSettings,
        "points",
        lambda self: [dataclasses.replace(POINTS["T=3"], retrain_samples=9, finetune_steps=100)],
    )
    case = Figure1Case("linear", "figure-1", "Figure 1", settings)
    found = case.candidates(FP64, OPTIONS)("samples-numpy")
    # A training of either method, and a fine-tuning after each.
    assert sum(found.scales.values()) == 7 * (1000 + 1000 + 2 * 100) / linear_training.SHORT
    monkeypatch.setattr(linear_training, "OUTER_LR", 0.04)
    with pytest.raises(GateError, match="samples-numpy, lora_ml, T=3 has"):
        case.candidates(FP64, OPTIONS)("samples-numpy")
