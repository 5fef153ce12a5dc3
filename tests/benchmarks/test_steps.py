"""Whole training steps: every version computes the same, and the parts of its time add up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import plot, steps
from benchmarks.lib import step_versions, task_by_task
from benchmarks.lib.gate import GateError
from benchmarks.lib.step_figures import COLORS, NAMES
from benchmarks.lib.step_parts import OTHER, PARTS, STEP, part_of, shares, step_shares
from benchmarks.lib.step_versions import (
    AT_ONCE,
    AUTHORS,
    COMPILED,
    FUSED,
    MERGED,
    PEFT,
    PLAIN,
    Gate,
    versions,
)
from benchmarks.lib.task_by_task import FASTER, products
from experiments.vision.mixer import Dropout

pytestmark = pytest.mark.slow

pytest.importorskip("transformers")
pytest.importorskip("peft")

CASES = {case.name: case for case in steps.CASES}


def run(module: Any, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_its_versions(name: str) -> None:
    case = CASES[name]
    made = versions(case.shrunk().new_setting(device="cpu"))
    assert set(case.versions) <= set(made) and set(case.profiled) <= set(case.versions)
    assert AUTHORS in case.versions and case.offered(["nothing", AUTHORS]) == [AUTHORS]
    assert set(NAMES) <= set(steps.VERSIONS) and tuple(COLORS) == PARTS


def test_the_sizes_of_the_cases() -> None:
    mixer, minilm, ragged = steps.mixer(), steps.equal_lengths(0.1), steps.ragged()
    assert mixer.work == ("images/s", 1024) and mixer.batches[0].counts == (256,) * 4
    assert [len(part.targets) for part in mixer.one_task[AUTHORS](mixer.batches[0])] == [64] * 16
    assert minilm.work == ("tokens/s", 80 * 48) and minilm.lora.rank == 8
    counts = ragged.batches[0].counts
    assert counts is not None and len(counts) == 640 == ragged.rounds.num_tasks
    assert counts.count(0) == 64 and counts.count(1) > 100 and max(counts) == counts[0] > 900


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a smoke run of all versions but the compiled ones."""
    folder = tmp_path_factory.mktemp("steps")
    names = [name for name in steps.VERSIONS if "compile" not in name]
    call = ["--smoke", "--write", str(folder), "--cases", "mixer", "minilm-p0", "--baselines"]
    assert run(steps, *call, *names) == 0
    return folder


def test_the_command_writes_its_tables(written: Path) -> None:
    record = json.loads((written / "steps_cpu.json").read_text())
    assert [one["case"] for one in record["rows"]] == ["mixer", "minilm-p0"]
    for one in record["rows"]:
        wanted = [name for name in CASES[one["case"]].versions if "compile" not in name]
        assert sorted(one["rows"]) == sorted(wanted)
        for name, row in one["rows"].items():
            assert row["status"] == "timed" and row["peak_bytes"] > 2**16
            short = name.endswith("bf16")
            assert row["precision"] == (
                "bf16" if short else FASTER if name.endswith(FASTER) else "fp32"
            )
            assert (row["error"] > 1e-4) == short
    parts = [row["parts"] for row in record["rows"][0]["rows"].values() if "parts" in row]
    assert len(parts) == 4
    for one in parts:
        assert tuple(one) == PARTS and sum(one.values()) == pytest.approx(1)
        assert one["products"] + one["LoRA"] > 0  # small products are metalora's own
        assert one["dropout"] > 0 and one["optimiser"] > 0
    page = (written / "steps_cpu.md").read_text()
    assert "| version | precision | step (quartiles) | rate | × authors' | time / plain |" in page
    assert f"| {AUTHORS} | fp32 |" in page and "| 1.00 |" in page
    assert "### Where the time of a step goes" in page


def test_the_figures_of_steps(written: Path, tmp_path: Path) -> None:
    results = str(written / "steps_cpu.json")
    assert run(plot, results, "--write", str(tmp_path), "--name", "steps") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["steps.png", "steps_parts.png"]
    assert run(plot, results, results, "--name", "steps") == 2


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    right = task_by_task.MergedLinear.__init__

    def wrong(self: Any, *arguments: Any) -> None:
        right(self, *arguments)
        self.scaling *= 1.5

    monkeypatch.setattr(task_by_task.MergedLinear, "__init__", wrong)


def one_task_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    right = step_versions.AllTasks.backward

    def wrong(self: Any, batch: Any) -> torch.Tensor:
        return right(self, batch.take(slice(0, -1), (*batch.counts[:-1], batch.counts[-1] - 1)))

    monkeypatch.setattr(step_versions.AllTasks, "backward", wrong)


def products_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU on which the faster products are less precise."""
    right = F.linear

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        if weight.dtype != torch.float32:
            return right(x, weight, bias)
        return right(x.bfloat16().float(), weight.bfloat16().float(), bias)

    monkeypatch.setattr(F, "linear", wrong)


@pytest.mark.parametrize(
    ("name", "plant"),
    [
        (MERGED, wrong_scale),
        (f"{MERGED}, bf16", wrong_scale),
        (FUSED, one_task_left_out),
        ("+ bf16", one_task_left_out),
        (f"{PLAIN}, {FASTER}", products_in_bf16),
    ],
)
def test_a_wrong_version_does_not_pass_the_gate(
    name: str, plant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = CASES["ragged"].shrunk().new_setting(device="cpu")
    gate = Gate(setting)
    assert gate(name, versions(setting)[name]()) < (0.1 if "bf16" in name else 1e-4)
    plant(monkeypatch)
    with pytest.raises(GateError, match="has a relative error"):
        gate(name, versions(setting)[name]())


def test_merged_weights_of_equal_and_of_absent_tasks() -> None:
    for case in ("mixer", "ragged"):
        setting = CASES[case].shrunk().new_setting(device="cpu")
        version = versions(setting)[MERGED]()
        assert Gate(setting)(MERGED, version) < 1e-4
    counts = setting.batches[0].counts
    assert counts is not None and 0 in counts and 1 in counts


def test_a_compiled_version_passes_the_gate() -> None:
    setting = CASES["ragged"].shrunk().new_setting(device="cpu")
    assert Gate(setting)(COMPILED, versions(setting)[COMPILED]()) < 0.1


def test_versions_have_a_task_optimiser_or_torchs() -> None:
    setting = CASES["ragged"].shrunk().new_setting(device="cpu")
    made = versions(setting)
    assert type(made[AT_ONCE]().step.optimizer) is torch.optim.AdamW  # type: ignore[union-attr]
    assert type(made[FUSED]().step.optimizer).__name__ == "TaskOptimizer"  # type: ignore[union-attr]
    assert not made[PEFT]().optimizer.param_groups[0]["fused"]  # type: ignore[union-attr]


def test_the_faster_products_end_with_their_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metalora.meta.precision.exact_by_onednn", lambda: True)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with products(FASTER):
        assert matmul.fp32_precision == "bf16"
    with products("bf16"):
        assert matmul.fp32_precision == before
    assert matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("names", "part"),
    [
        ("aten::mm, metalora::lora_linear_weight, training step", "products"),
        ("aten::addmm, aten::linear, training step", "products"),
        ("metalora::lora_linear_token_backward, training step", "LoRA"),
        ("aten::copy_, _TokenRouteBackward, training step", "LoRA"),
        ("aten::bmm, aten::scaled_dot_product_attention, training step", "attention"),
        ("aten::bernoulli_, aten::scaled_dot_product_attention, training step", "attention"),
        ("metalora::packed_attention_backward, training step", "attention"),
        ("aten::native_layer_norm_backward, training step", "normalisation"),
        ("aten::gelu, training step", "activation"),
        ("aten::where, nn.Dropout, training step", "dropout"),
        ("aten::mul, aten::dropout, training step", "dropout"),
        ("aten::_fused_adamw_, Optimizer.step#AdamW.step, training step", "optimiser"),
        ("aten::copy_, aten::_to_copy, aten::to, training step", "copies and casts"),
        ("aten::where, training step", OTHER),
        ("training step", OTHER),
    ],
)
def test_the_part_of_an_operator(names: str, part: str) -> None:
    assert part_of(names.split(", ")) == part


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_parent: Any = None
    sequence_nr: int = -1


def test_a_gradient_belongs_to_the_part_of_its_operator() -> None:
    step = Event(STEP, 1)
    dropout = Event("nn.Dropout", 1, step)
    forward = Event("aten::where", 2, dropout, 7)
    node = Event("autograd::engine::evaluate_function: WhereBackward0", 1, step, 7)
    inner = Event("WhereBackward0", 1, node, 7)
    found = shares([Event("before", 50), step, dropout, forward, node, inner])
    assert found["dropout"] == pytest.approx(5 / 6) and found[OTHER] == pytest.approx(1 / 6)


def test_where_the_time_of_a_small_step_goes() -> None:
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), Dropout(0.5), nn.Linear(512, 8))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.randn(256, 64)

    def step() -> None:
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()

    step()
    found = step_shares(step)
    assert tuple(found) == PARTS and sum(found.values()) == pytest.approx(1)
    assert found["LoRA"] == found["attention"] == found["normalisation"] == 0
    assert min(found[p] for p in ("products", "activation", "dropout", "optimiser")) > 0.01
    assert not torch.nn.modules.module._global_forward_hooks


def test_a_case_that_there_was_no_time_for_is_named() -> None:
    rows = [{"case": "mixer", "rows": {PLAIN: {"status": "left out: the time was up"}}}]
    record = {"title": "Steps", "command": "c", "machine": {"cpu": "x"}, "rows": rows}
    text = steps.BENCHMARK.page(record)
    assert f"### mixer\n\n- {PLAIN}: left out: the time was up" in text
