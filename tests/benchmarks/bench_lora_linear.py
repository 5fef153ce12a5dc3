"""`lora_linear` beside its baselines under pytest-benchmark, each behind the correctness gate.

    python -m pytest tests/benchmarks/bench_lora_linear.py --benchmark-group-by=param:case

For a quick look, and for pytest-benchmark's comparison of two commits (``--benchmark-autosave``,
``--benchmark-compare``). `python -m benchmarks.lora_linear` measures the same in turns, and
relative to the dense layer.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.lib.cases import PRECISIONS
from benchmarks.lib.tensor_case import SEED, Setup
from benchmarks.lora_linear import BENCHMARK, LayerCase

PRECISION = PRECISIONS["fp32"]


@pytest.mark.parametrize("name", ["metalora", "loop", "bmm", "merged", "dense"])
@pytest.mark.parametrize("case", BENCHMARK.select(["cpu"]), ids=lambda case: case.name)
def test_forward_backward(benchmark: BenchmarkFixture, case: LayerCase, name: str) -> None:
    tensors = case.tensors(PRECISION)
    run = case.run(name, tensors, Setup(case, PRECISION, "cpu", SEED))
    run.call("cpu")
    exact = case.exact_results(name, tensors, list(run.leaves))
    case.check(name, run.results, exact, PRECISION.tolerance)
    benchmark(run.call, "cpu")
