"""The benchmark of freed memory measures what its table says."""

from __future__ import annotations

import json

import pytest

from benchmarks.freed_memory import KEEP, main, measured_apart, table


def test_the_table() -> None:
    """Ratios are of neighbouring processes; everything else is a median."""
    returned = [{"seconds": s, "faults": 1000.0, "peak": 2.0**30} for s in (2.0, 3.0, 8.0)]
    kept = [{"seconds": s, "faults": 10.0, "peak": 2.0**31} for s in (1.0, 2.0, 2.0)]
    rows = [{"model": "mixer", "precision": "bf16", "returned": returned, "kept": kept}]
    header, (row,) = table(rows)
    assert len(header) == len(row)
    assert row[2:] == ["3.000", "2.000", "2.00 (1.50 to 4.00)", "1,000", "10", "1,024", "2,048"]


def test_a_step_here(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        main(["--smoke", "--only", "minilm-bf16"])
    assert not done.value.code
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"seconds", "faults", "peak"} and found["seconds"] > 0


@pytest.mark.skipif("not hasattr(__import__('ctypes').CDLL(None), 'mallopt')", reason="no glibc")
def test_kept_memory_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's own environment says does not reach the processes that are compared."""
    for name, value in KEEP.items():
        monkeypatch.setenv(name, value)
    returned, kept = (measured_apart("mixer-fp32", 2, True, kept=kept) for kept in (False, True))
    assert kept["faults"] < returned["faults"] / 2
