"""The smaller operators' benchmarks: their gates and what they say of the memory moved."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from benchmarks import dropout_mask, merge_lora, packed_attention, task_matvec, token_losses
from benchmarks.lib.cases import PRECISIONS, Case, Options
from benchmarks.lib.gate import GateError
from metalora import ops

pytestmark = pytest.mark.slow

FP32 = PRECISIONS["fp32"]


def of(module: object, operator: str) -> Case:
    return next(c for c in module.BENCHMARK.cases if c.operator == operator).shrunk()  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", ["autocast", "tf32", "fp32", "fp64"])
@pytest.mark.parametrize(
    "module", [merge_lora, task_matvec, dropout_mask, packed_attention, token_losses]
)
def test_every_version_passes_the_gate(module, precision: str) -> None:
    options = Options(tuple(module.BENCHMARK.versions["all"]))
    for case in module.BENCHMARK.cases:
        if precision in module.BENCHMARK.precisions or precision == "fp64":
            make = case.shrunk().candidates(PRECISIONS[precision], options)
            tolerance = 0.05 if module is dropout_mask else PRECISIONS[precision].tolerance
            assert all(make(n).error <= tolerance for n in case.offered(options.names))


@pytest.mark.parametrize("operator", ["merge_lora", "merge_lora_symmetric"])
def test_merging_moves_every_input_and_result_once(operator: str) -> None:
    case = of(merge_lora, operator)
    tasks, outer, inner = case.sizes["grad"]  # type: ignore[attr-defined]
    rank = case.sizes["lora_U" if "symmetric" in operator else "lora_B"][2]  # type: ignore[attr-defined]
    factors = 4 * tasks * rank * (inner if "symmetric" in operator else outer + inner)
    merged = 2 * tasks * outer * inner
    assert case.about(PRECISIONS["autocast"], "cpu")["work"]["amounts"] == {
        "forward": 4 * outer * inner + factors + merged,
        "backward": merged + 2 * factors + 4 * outer * inner,
    }
    copy = case.candidates(FP32, Options(("copy",)))("copy")
    assert list(copy.sets[0]) == ["forward", "backward"]


def scaled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *a, **k: function(*a, **k) * 1.01


def turned(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *a, **k: ~function(*a, **k)


@pytest.mark.parametrize(
    ("module", "operator", "wrong"),
    [
        (merge_lora, "merge_lora", scaled),
        (merge_lora, "merge_lora_symmetric", scaled),
        (task_matvec, "task_matvec", scaled),
    ],
)
def test_the_gate_finds_a_wrong_result(
    module, operator: str, wrong: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    make = of(module, operator).candidates(FP32, Options(("metalora",)))
    make("metalora")
    monkeypatch.setattr(ops, operator, wrong(getattr(ops, operator)))
    with pytest.raises(GateError, match="y has a relative error"):
        make("metalora")


@pytest.mark.parametrize(("name", "message"), [("metalora", "relative"), ("torch", "share kept")])
def test_the_gate_finds_a_wrong_mask(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = of(dropout_mask, "dropout_mask").candidates(FP32, Options((name,)))
    make(name)
    right = dropout_mask.FUNCTIONS[name]
    monkeypatch.setitem(dropout_mask.FUNCTIONS, name, lambda setup: turned(right(setup)))
    with pytest.raises(GateError, match=message):
        make(name)
