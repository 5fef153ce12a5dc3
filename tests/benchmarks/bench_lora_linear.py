"""`lora_linear` beside its baselines under pytest-benchmark, each behind the correctness gate.

    python -m pytest tests/benchmarks/bench_lora_linear.py --benchmark-group-by=param:case

For a quick look, and for pytest-benchmark's comparison of two commits (``--benchmark-autosave``,
``--benchmark-compare``). `python -m benchmarks.layers` measures the same in turns, and relative to
the dense layer.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.lib.baselines import BASELINES, Setup
from benchmarks.lib.gate import SEED, Run, check, exact_results, wanted_gradients
from benchmarks.lib.registry import PRECISIONS, Case, select

PRECISION = PRECISIONS["fp32"]


@pytest.mark.parametrize("name", ["metalora", "loop", "bmm", "merged", "dense"])
@pytest.mark.parametrize("case", select(["cpu"]), ids=lambda case: case.name)
def test_forward_backward(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    tensors, adapters = case.tensors(PRECISION), name != "dense"
    wanted = wanted_gradients(adapters, frozen=False)
    layer = BASELINES[name](Setup(case, PRECISION, "cpu", SEED))
    run = Run(layer, tensors, wanted, PRECISION)

    def step() -> None:
        run.forward()
        run.backward()

    step()
    check(case, run.results, exact_results(case, tensors, wanted, adapters), PRECISION.tolerance)
    benchmark(step)
