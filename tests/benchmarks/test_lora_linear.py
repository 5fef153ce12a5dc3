"""The layers side by side: all compute the same, what is wrong or missing is named, not timed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plot
from benchmarks.lib import lora_linear_versions, operators
from benchmarks.lib.cases import PRECISIONS, NotOfferedError, Options
from benchmarks.lib.cli import BenchmarkSettings
from benchmarks.lib.gate import GateError
from benchmarks.lib.lora_linear_versions import COMPILED, EAGER, ROUTES, VERSIONS, Layer, drop
from benchmarks.lib.measure import Budget
from benchmarks.lib.operators import LEFT_OUT
from benchmarks.lib.tensor_case import SEED, Setup
from benchmarks.lora_linear import BENCHMARK, LayerCase, equal, main, ragged
from experiments.lib.errors import RunError
from tests.pairs import every_pair

pytestmark = pytest.mark.slow

INPUTS = ("x", "weight", "bias", "lora_A", "lora_B")
EQUAL, RAGGED = equal(3, 16, 24, 3, 8), ragged(16, 8, 2, (40, 0, 1, 13))
CASES = [EQUAL, RAGGED, replace(RAGGED, name="dropout", dropout=0.25)]
NO_DROPOUT = ("unsloth", "merged", "merged-grouped", "metalora-weight", "metalora-keep")
# What torch.nn.functional.grouped_mm does not take.
NO_GROUPS = {("grouped", "fp64"), ("merged-grouped", "fp64")}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def passes(case: LayerCase, name: str, precision: str = "fp32", frozen: bool = False) -> set[str]:
    """Raises where the version does not pass the gate; the names of its results."""
    chosen = PRECISIONS[precision]
    tensors = case.tensors(chosen)
    run = case.run(name, tensors, Setup(case, chosen, "cpu", SEED), frozen)
    run.call("cpu")
    exact = case.exact_results(name, tensors, list(run.leaves))
    case.check(name, run.results, exact, chosen.tolerance)
    return set(run.results)


@every_pair(name=[*EAGER, *ROUTES], case=CASES, precision=PRECISIONS)
def test_every_version_passes_the_gate(name: str, case: LayerCase, precision: str) -> None:
    if (name, precision) in NO_GROUPS:
        with pytest.raises((RuntimeError, NotOfferedError)):
            passes(case, name, precision)
        return
    if case.dropout and name in NO_DROPOUT:
        with pytest.raises(NotOfferedError, match="dropout"):
            passes(case, name, precision)
        return
    if precision == "bf16" and name in ("merged", "merged-grouped"):
        with pytest.raises(NotOfferedError, match="lose the adapter"):
            passes(case, name, precision)
        return
    adapters = set() if name == "dense" else {"lora_A", "lora_B"}
    assert passes(case, name, precision) == {"y", "x", "weight", "bias"} | adapters


@pytest.mark.parametrize("case", CASES[:2], ids=["equal", "ragged"])
@pytest.mark.parametrize("name", EAGER)
def test_every_version_passes_with_frozen_weights(name: str, case: LayerCase) -> None:
    adapters = set() if name == "dense" else {"lora_A", "lora_B"}
    assert passes(case, name, frozen=True) == {"y", "x"} | adapters


@pytest.mark.exhaustive
def test_a_compiled_version_passes_the_gate() -> None:
    passes(EQUAL, "merged+compile", "autocast")


def test_compiled_versions_are_those_of_the_simple_ones() -> None:
    simple, modes = ("dense", "loop", "bmm", "merged"), ("compile", "max-autotune")
    assert set(COMPILED) == {f"{name}+{mode}" for name in simple for mode in modes}


def planted(change: Callable[[list[Tensor]], list[Tensor]]) -> Callable[[Setup], Layer]:
    """The loop over tasks, with its inputs changed."""

    def make(setup: Setup) -> Layer:
        right = lora_linear_versions.loop(setup)
        return lambda *inputs: right(*change(list(inputs)))

    return make


def no_weight_gradient(inputs: list[Tensor]) -> list[Tensor]:
    return [inputs[0], inputs[1].detach(), *inputs[2:]]


def one_percent(inputs: list[Tensor]) -> list[Tensor]:
    return [*inputs[:4], 1.01 * inputs[4]]


def wrong_task_of_one_row(inputs: list[Tensor]) -> list[Tensor]:
    scale = torch.ones(len(inputs[3]), 1, 1)
    scale[2] = 1.1
    return [*inputs[:3], scale * inputs[3], inputs[4]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_weight_gradient, "there is no gradient of weight"),
        (one_percent, "y has a relative error of .*, above 5e-05"),
        (wrong_task_of_one_row, "y has a relative error"),
    ],
)
def test_the_gate_finds(
    change: Callable[[list[Tensor]], list[Tensor]], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes(RAGGED, "loop")
    monkeypatch.setitem(VERSIONS, "loop", planted(change))
    with pytest.raises(GateError, match=message):
        passes(RAGGED, "loop")


@pytest.mark.parametrize("name", ["y", *INPUTS])
def test_the_gate_looks_at_every_result_and_task(name: str) -> None:
    tensors = RAGGED.tensors(PRECISIONS["fp64"])
    exact = RAGGED.exact_results("loop", tensors, INPUTS)

    def check(got: dict[str, Tensor], tolerance: float) -> float:
        return RAGGED.check("loop", got, exact, tolerance)

    assert check(exact, 0.0) == 0.0
    for wrong in (torch.nan, 1.0):
        changed = exact[name].clone()
        last_row_or_task = changed[-1:] if name != "lora_A" else changed[1]  # the empty task
        last_row_or_task.view(-1)[0] += wrong
        with pytest.raises(GateError, match=f"^{name} has"):
            check(exact | {name: changed}, 1e-3)
    with pytest.raises(GateError, match=r"is \[.*\], not"):
        check(exact | {name: exact[name][:-1]}, 1e-3)


def quick(*names: str) -> Options:
    return Options(("dense", *names), rounds=2, seconds_a_turn=0.0)


def test_what_is_wrong_is_listed_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(setup: Setup) -> Layer:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setitem(VERSIONS, "loop", planted(one_percent))
    monkeypatch.setitem(VERSIONS, "bmm", broken)
    options = quick("loop", "bmm", "unsloth", "metalora")
    record = operators.measure_case(BENCHMARK, CASES[2], PRECISIONS["fp32"], options, Budget())
    rows = record["rows"]
    assert rows["loop"]["status"].startswith("wrong: y has a relative error of")
    assert rows["bmm"]["status"] == "failed: RuntimeError: first line"
    assert rows["unsloth"]["status"].startswith("not offered: ")
    assert all("total" not in rows[name] for name in ("loop", "bmm", "unsloth"))
    assert rows["dense"]["relative"] == 1.0
    ours, floor = rows["metalora"]["total"]["median"], rows["dense"]["total"]["median"]
    assert rows["metalora"]["relative"] == pytest.approx(ours / floor)
    assert record["route"] == "token"


def measured(
    folder: Path,
    seconds: float = 1e9,
    cases: Sequence[LayerCase] = (EQUAL, RAGGED),
    names: Sequence[str] = ("metalora", "loop"),
    **changes: Any,
) -> list[dict[str, Any]]:
    return operators.measure(
        BENCHMARK,
        cases,
        [PRECISIONS["fp32"]],
        quick(*names),
        BenchmarkSettings(write=folder, name="table"),
        command="python -m this --resume --cases other --threads 1",
        budget=Budget(seconds),
        **changes,
    )


def test_tables_and_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = measured(tmp_path, seconds=0)
    assert {row["status"] for record in out for row in record["rows"].values()} == {LEFT_OUT}
    text = (tmp_path / "table.md").read_text()
    assert f"- loop: {LEFT_OUT} ({EQUAL.name}, fp32; {RAGGED.name}, fp32)" in text

    first = measured(tmp_path, resume=True)
    record = json.loads((tmp_path / "table.json").read_text())
    assert record["rows"] == json.loads(json.dumps(first))
    assert {"cpu", "torch", "metalora", "date"} <= set(record["machine"])
    text = (tmp_path / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert f"| {EQUAL.name} | fp32 | weight |" in text and "    python -m this" in text
    ratio = first[0]["rows"]["loop"]["relative"]
    assert f"| {EQUAL.name} | fp32 | loop |" in text and f"{ratio:.2f}" in text

    again: list[LayerCase] = []
    measure_case = operators.measure_case

    def measure_again(benchmark: Any, case: LayerCase, *arguments: Any) -> dict[str, Any]:
        again.append(case)
        return measure_case(benchmark, case, *arguments)

    monkeypatch.setattr(operators, "measure_case", measure_again)
    assert measured(tmp_path, resume=True) == record["rows"] and not again
    del record["rows"][1]["rows"]["loop"]
    (tmp_path / "table.json").write_text(json.dumps(record))
    assert measured(tmp_path, resume=True)[0] == record["rows"][0] and again == [RAGGED]
    record["machine"]["cpu"] = "another"
    (tmp_path / "table.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match="another machine"):
        measured(tmp_path, resume=True)


def test_resuming_keeps_other_cases_and_repeats_all_of_them(tmp_path: Path) -> None:
    (first,) = measured(tmp_path, cases=[EQUAL], names=["metalora"])
    more = measured(tmp_path, cases=[RAGGED], names=["loop"], resume=True)
    assert [one["case"] for one in more] == [EQUAL.name, RAGGED.name]
    assert more[0] == json.loads(json.dumps(first)) and set(more[1]["rows"]) == {"dense", "loop"}
    (*_, command) = (tmp_path / "table.md").read_text().strip().splitlines()
    assert shlex.split(command) == [
        *("python", "-m", "this", "--threads", "1", "--cases", EQUAL.name, RAGGED.name),
        *("--precisions", "fp32", "--baselines", "dense", "metalora", "loop"),
    ]
    again = measured(tmp_path, cases=[EQUAL], names=["loop"], resume=True)
    assert set(again[0]["rows"]) == {"dense", "metalora", "loop"} and again[1] == more[1]


def test_the_figure_has_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timing = {"median": 1e-3, "low": 1e-3, "high": 1e-3, "spread": 0.0}
    rows = {name: {"status": "timed", "relative": 1.5, "total": timing} for name in VERSIONS}
    record = {"case": "c 512→256 16384 rows/task T4 r1", "precision": "tf32", "rows": rows}
    page = {
        "title": "T",
        "floor": "dense",
        "machine": {"cpu": "C", "torch": "1", "date": "today"},
        "rows": [record],
    }
    (tmp_path / "one.json").write_text(json.dumps(page))
    drawn: list[str] = []
    dot = plot._dot

    def noted(axes, name, look, ratio, y):
        drawn.append(name)
        dot(axes, name, look, ratio, y)

    monkeypatch.setattr(plot, "_dot", noted)
    record = plot.load(tmp_path / "one.json")
    assert plot.draw(record, "one", tmp_path) == [tmp_path / "one_tf32.png"]
    assert set(drawn) == set(VERSIONS) - {"dense"}
    assert (tmp_path / "one_tf32.pdf").stat().st_size > 0


def test_main_measures_tiny_shapes(tmp_path: Path) -> None:
    arguments = "--cases a --smoke --baselines loop --frozen --name x --write"
    with pytest.raises(SystemExit) as ended:
        main([*arguments.split(), str(tmp_path)])
    assert not ended.value.code
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["command"].endswith("--write benchmarks/results")
    assert len(record["rows"]) == 2 and all(r["frozen"] for r in record["rows"])
    assert record["title"].endswith("on the CPU, shared weights frozen, tiny sizes")


def test_dropout_is_what_one_trains_with_when_it_is_timed() -> None:
    setup = Setup(CASES[2], PRECISIONS["fp32"], "cpu")
    torch.manual_seed(1)
    dropped = drop(setup, torch.ones(4, 16))
    torch.manual_seed(1)
    assert dropped.equal(F.dropout(torch.ones(4, 16), 0.25))


@pytest.mark.gpu
def test_a_gpu_replays_graphs() -> None:
    options = replace(quick("metalora", "loop"), device="cuda")
    record = operators.measure_case(BENCHMARK, EQUAL, PRECISIONS["fp32"], options, Budget())
    for row in record["rows"].values():
        assert row["status"] == "timed" and row["note"] == ""
        assert row["peak_bytes"] > 0
