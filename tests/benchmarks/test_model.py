"""What the cost model predicts, and its command."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import model
from benchmarks.lib import cost_model, tuning
from benchmarks.lib.cost_model import Call, Ceilings
from benchmarks.lora_linear import BENCHMARK


def exit_code(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        model.main(arguments)
    return int(caught.value.code or 0)


CEILINGS = model.Settings().ceilings()


def relative(case: str, precision: str = "autocast") -> float:
    (found,) = BENCHMARK.select([case])
    dense, ours = model.predict(found, precision).times(CEILINGS)  # type: ignore[arg-type]
    return ours / dense


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("a 768→768 L40 T10 r8", 1.08),
        ("a 768→3072 L40 T10 r8", 1.08),
        ("a 3072→768 L40 T10 r8", 1.08),
        ("a 768→768 L40 T10 r8 p0.1", 1.35),
        *((case.name, 1.10) for case in BENCHMARK.select(["c"])),
        *((case.name, 1.12) for case in BENCHMARK.select(["b"])),
    ],
)
def test_predictions_are_within_the_goals(
    case: str, limit: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a GPU finds the bias's gradient quicker in a pass of its own."""
    assert 0.8 < relative(case) <= limit
    of_table = cost_model.chosen

    def chosen(what: str, *sizes: int) -> tuning.Row:
        row = of_table(what, *sizes)
        return replace(row, depth=0) if what == "bias_sums" else row

    monkeypatch.setattr(cost_model, "chosen", chosen)
    assert 1 < relative(case) <= limit


@pytest.mark.parametrize(
    ("case", "gain"),
    [("a 768→768 L40 T10 r8", 0.25), ("a 768→768 L40 T10 r8 p0.1", 0.2), ("b", 0.08)],
)
def test_layers_that_read_the_same_x_gain_by_what_they_hand_on(case: str, gain: float) -> None:
    for found in BENCHMARK.select([case]):
        shared, alone = (
            model.predict(found, "autocast", readers=3, alone=alone).times(CEILINGS)  # type: ignore[arg-type]
            for alone in (False, True)
        )
        assert shared[0] == alone[0] and shared[1] < (1 - gain) * alone[1]


def test_what_layers_hand_on_is_no_call_of_theirs() -> None:
    (case,) = BENCHMARK.select(["a 768→768 L40 T10 r8"])
    one, shared, alone = (
        model.predict(case, "autocast", **settings).metalora  # type: ignore[arg-type]
        for settings in ({}, {"readers": 3}, {"readers": 3, "alone": True})
    )
    names = [[call.name for call in calls] for calls in (one, shared, alone)]
    assert [found.count("cast") for found in names] == [0, 2, 6]
    assert [found.count("add") for found in names] == [0, 0, 2]
    assert len(shared) == 3 * len(one) + 2 and len(alone) == 3 * len(one) + 8


def test_a_call_takes_the_longest_of_what_it_does() -> None:
    ceilings = Ceilings(1e9, {"short": 1e12, "fp32": 1e11}, 1e10, 1e-6, 4)
    assert Call("k", "forward", 2e9).seconds(ceilings) == pytest.approx(2)
    assert Call("k", "forward", 1e9, 3e12, "short").seconds(ceilings) == pytest.approx(3)
    assert Call("k", "forward", 1e9, 3e12, "short", 5).seconds(ceilings) == pytest.approx(4.8)
    assert Call("k", "forward", 1e9, randoms=5e10).seconds(ceilings) == pytest.approx(5)
    assert Call("k", "forward", 1e9, after=1e9).seconds(ceilings) == pytest.approx(2)


def test_measurements_stand_beside_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = "c 64→256 131072 rows/task T4 r1"
    rows = {
        name: {"total": {"median": time}} for name, time in (("dense", 2e-4), ("metalora", 3e-4))
    }
    record = {"rows": [{"case": case, "precision": "tf32", "frozen": False, "rows": rows}]}
    (tmp_path / "found.json").write_text(json.dumps(record))
    call = ["--cases", "c", "--precisions", "tf32", "--measured", str(tmp_path / "found.json")]
    assert exit_code(*call, "--calls") == 0
    text = capsys.readouterr().out
    assert sum(line.endswith("| 200 | 300 | 1.50 |") for line in text.splitlines()) == 1
    assert "Predicted, not measured" in text
    assert "| merge_kernel | forward |" in text


def test_what_there_is_no_model_of_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--precisions", "fp64") == 2
    assert "there is no model of 'fp64'" in capsys.readouterr().err
