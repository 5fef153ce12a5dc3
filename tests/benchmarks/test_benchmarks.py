"""The benchmarks run, and their gates find what is wrong."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import baselines
from benchmarks.measure import side_by_side
from benchmarks.registry import CPU_CASES, equal, ragged

ROOT = Path(__file__).resolve().parents[2]
SMALL = [equal(3, 10, 10, 1, 5), ragged(9, 7, 2, (4, 0, 1, 6))]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", baselines.LAYERS)
def test_every_layer_passes_its_gate(case, name: str) -> None:
    baselines.check(case, name)


def test_the_gate_finds_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(case):
        layer = baselines.loop_layer(case)
        return lambda x, weight, bias, lora_A, lora_B: layer(x, weight, bias, lora_A, 1.01 * lora_B)

    monkeypatch.setitem(baselines.LAYERS, "loop", wrong)
    with pytest.raises(AssertionError, match="loop is wrong on T3 10→10"):
        baselines.check(SMALL[0], "loop")


def test_registry_spans_the_range_of_shapes() -> None:
    shapes = {
        (c.tasks, c.in_features, c.rank) for c in CPU_CASES if c.in_features == c.out_features
    }
    assert {(3, 10, 1), (10, 128, 4), (10, 768, 8)} <= shapes
    assert any(0 in case.rows and 1 in case.rows for case in CPU_CASES)
    x, *_ = SMALL[1].tensors(torch.float64)
    assert x.shape == (11, 9) and SMALL[1].task_ptr().tolist() == [0, 4, 4, 5, 11]


def test_timings_are_ordered() -> None:
    timings = side_by_side(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)},
        rounds=5,
        seconds_a_round=0.005,
    )
    short, long = timings["short"], timings["long"]
    assert 0.001 <= short.low <= short.median <= short.high
    assert long.median > 2 * short.median


def test_the_pytest_benchmark_form_runs() -> None:
    command = "-m pytest benchmarks/bench_lora_linear.py -q --benchmark-disable -k T3"
    run = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
