"""The benchmark of the shallow network: its gates, and the table it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import bench_shallow
from benchmarks.bench_shallow import GROUPS


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "TRAININGS": 2,
        "SAMPLES": 30,
        "FEW": 12,
        "NATIVE_EPOCHS": 2,
        "REFERENCE_EPOCHS": 2,
        "EAGER_EPOCHS": 2,
        "GATE_EPOCHS": 5,
        "ROUNDS": 2,
    }.items():
        monkeypatch.setattr(bench_shallow, name, value)


@pytest.mark.parametrize("group", GROUPS)
def test_every_version_trains_as_the_native_one(group: str) -> None:
    bench_shallow.check(group)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("position", [0, 4])  # learning rate, weight decay
def test_the_gate_finds_a_wrong_version(
    group: str, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = list(bench_shallow.ADAMW)
    wrong[position] *= 2
    monkeypatch.setattr(bench_shallow, "ADAMW", tuple(wrong))
    with pytest.raises(AssertionError, match=f"{group}, eager, loop over tasks"):
        bench_shallow.check(group)


def test_the_table(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        bench_shallow.main(["--write", str(tmp_path)])
    assert not ended.value.code
    rows = json.loads((tmp_path / "shallow_training.json").read_text())["rows"]
    assert {row["group"] for row in rows} == set(GROUPS)
    lines = (tmp_path / "shallow_training.md").read_text().splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == len(rows) + 2
    for row in rows:
        if row["version"] == "native":
            native = row["median"]
        ratio = f"{row['median'] / native:.1f}x |"
        (line,) = [x for x in lines if x.startswith(f"| {row['group']} | {row['version']} |")]
        assert line.endswith(ratio)
