"""Every kernel compiles for every architecture of the build, without spilling registers."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import kernel_resources as gate

LOG = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN8metalora4cuda6kernelIfEEvPT_' for 'sm_80'
ptxas info    : Function properties for _ZN8metalora4cuda6kernelIfEEvPT_
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 16 bytes cumulative stack size, 512 bytes smem
ptxas info    : Compiling entry function 'other' for 'sm_90'
ptxas info    : Function properties for other
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 384 bytes cmem[0]
"""

SPILLS = """
__global__ void __launch_bounds__(768, 2) planted(float* x) {
  float kept[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) kept[i] = x[i * 768 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) x[i * 768 + threadIdx.x] = kept[127 - i] * kept[i];
}
"""


def setup_architectures() -> list[str]:
    return list(gate.load_setup().ARCHITECTURES.split(";"))


@pytest.fixture(scope="module")
def nvcc() -> Path:
    found, why = gate.find_nvcc()
    if found is None:
        pytest.skip(f"no nvcc: {why}")
    return found


def test_the_table_is_of_these_sources() -> None:
    """Compiling all takes minutes, so every day only that the table was made after a change."""
    assert gate.read_digest(gate.RESULTS) == gate.digest(gate.kernels()), (
        "the CUDA sources have changed since their table was written: "
        "run python -m benchmarks.kernel_resources --write, which also finds spills"
    )
    recorded = gate.read_recorded(gate.RESULTS)
    assert {r.architecture for r in recorded} == {"sm_80", "sm_90", "sm_100", "sm_120"}
    assert not any(r.spills for r in recorded)


@pytest.mark.parametrize("name", ["kernel.cu", "header.h", "deeper/last.h"])
def test_a_change_in_a_source_or_what_it_includes_is_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "deeper").mkdir()
    (tmp_path / "kernel.cu").write_text('#include "header.h"\n#include <math.h>\nint a;\n')
    (tmp_path / "header.h").write_text('#include "deeper/last.h"\nint b;\n')
    (tmp_path / "deeper/last.h").write_text('#include "../header.h"\nint c;\n')
    before = gate.digest([tmp_path / "kernel.cu"])
    changed = tmp_path / name
    changed.write_text(changed.read_text() + "// a remark\n")
    assert gate.digest([tmp_path / "kernel.cu"]) == before
    changed.write_text(changed.read_text() + "int d;\n")
    assert gate.digest([tmp_path / "kernel.cu"]) != before


@pytest.mark.exhaustive
def test_kernels_are_those_of_the_table_and_do_not_spill(nvcc: Path) -> None:
    measured = gate.measure(nvcc, gate.kernels())
    built = [a.removesuffix("+PTX").replace(".", "") for a in setup_architectures()]
    assert {f"sm_{number}" for number in built} <= {r.architecture for r in measured}
    errors, notes = gate.compare(measured, gate.read_recorded(gate.RESULTS))
    print("\n".join(notes))
    assert not errors, "\n".join(errors)


def test_planted_spill_is_found(nvcc: Path, tmp_path: Path) -> None:
    source = tmp_path / "planted.cu"
    source.write_text(SPILLS)
    measured = gate.measure(nvcc, [source])
    errors, _ = gate.compare(measured, measured)
    assert len(errors) == 4
    assert all("planted on sm_" in error and "spills" in error for error in errors)


def test_log_is_understood() -> None:
    code = {
        ("_ZN8metalora4cuda6kernelIfEEvPT_", "sm_80"): Counter({"FFMA": 5, "EXIT": 1}),
        ("other", "sm_90"): Counter({"EXIT": 1}),
    }
    first, second = gate.parse(LOG, code)
    assert first == gate.Resources("kernel<float>", "sm_80", 40, 512, 16, 12, 6)
    assert second == gate.Resources("other", "sm_90", 255, 0, 0, 0, 1)
    assert (first.warps, second.warps) == (48, 8)
    with pytest.raises(ValueError, match="not understood"):
        gate.parse("Compiling entry function '_Z1k' for 'sm_80'\nUsed 3 registers", {})


def test_comparison() -> None:
    a = gate.Resources("a", "sm_80", 40, 0, 0, 0, 100)
    assert gate.compare([a], [a]) == ([], [])
    assert "spills 8 bytes" in gate.compare([replace(a, spills=8)], [a])[0][0]
    assert "not in the table" in gate.compare([a], [])[0][0]
    assert "no longer built" in gate.compare([], [a])[0][0]
    assert gate.compare([replace(a, instructions=110)], [a]) == ([], [])
    assert "has 111 instructions" in gate.compare([replace(a, instructions=111)], [a])[0][0]
    errors, notes = gate.compare([replace(a, registers=41)], [a])
    assert not errors
    assert "a on sm_80: 41 registers" in notes[0]


def test_table_is_read_as_written(tmp_path: Path) -> None:
    rows = [gate.Resources("a<float, 2>", "sm_90", 40, 16, 0, 0, 9)]
    gate.write(tmp_path, rows, "nvcc 13.0", "a digest")
    assert gate.read_digest(tmp_path) == "a digest"
    assert gate.read_recorded(tmp_path) == rows
    assert (
        "| `a<float, 2>` | sm_90 | 40 | 48 | 16 | 0 | 0 | 9 |"
        in (tmp_path / "kernel_resources.md").read_text()
    )
