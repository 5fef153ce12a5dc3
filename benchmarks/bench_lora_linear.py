"""`lora_linear` beside its baselines under pytest-benchmark, each behind the correctness gate.

python -m pytest benchmarks/bench_lora_linear.py --benchmark-group-by=param:case

`python -m benchmarks.cpu_ops` measures the same in turns and prints ratios.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.baselines import LAYERS, check, forward_backward
from benchmarks.registry import CPU_CASES, Case


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", CPU_CASES, ids=lambda case: case.name)
def test_forward_backward(benchmark: BenchmarkFixture, case: Case, layer: str) -> None:
    check(case, layer)
    benchmark(forward_backward, LAYERS[layer](case), case.tensors())
