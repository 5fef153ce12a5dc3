"""The rates of the two small models' trainers, behind their gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import trainers


def test_smoke_writes_a_table_of_both_models(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        trainers.main(["--smoke", "--write", str(tmp_path)])
    assert not ended.value.code
    rows = json.loads((tmp_path / "trainers_cpu.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["linear", "shallow"]
    assert all(0 <= row["error"] < 1e-4 and row["median"] > 0 for row in rows)
    assert "trainings a second" in (tmp_path / "trainers_cpu.md").read_text()


@pytest.mark.parametrize("name", trainers.MODELS)
def test_wrong_losses_do_not_pass_the_gate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, calls = trainers.MODELS[name], []

    def wrong(count: int, device: str) -> trainers.Trainings:
        trainings = make(count, device)

        def run(steps: int) -> torch.Tensor:
            calls.append(steps)
            return trainings.run(steps) * (1.01 if len(calls) == 1 else 1.0)

        return trainers.Trainings(count, run)

    monkeypatch.setitem(trainers.MODELS, name, wrong)
    with pytest.raises(AssertionError, match=f"{name}: the losses differ by"):
        trainers.check(name, "cpu")
