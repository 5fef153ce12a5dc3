"""The cost model counts the kernels and products that the CUDA code really asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.lib.cases import PRECISIONS
from benchmarks.lib.cost_model import Layer, layer_calls
from benchmarks.lora_linear import equal
from benchmarks.model import layer_of
from tests.cuda.places import calls_of_layer
from tests.pairs import every_pair

pytestmark = pytest.mark.slow

ROWS = {"equal": (24, 24, 24), "chunks": (512, 512), "ragged": (30, 0, 17, 5), "one task": (40,)}


def layer(rows: tuple[int, ...], precision: str, **changes: Any) -> Layer:
    case = replace(equal(1, 32, 24, 3, 1), rows=rows)
    return replace(layer_of(case, PRECISIONS[precision]), **changes)


@every_pair(
    rows=[*ROWS.values()],
    bias=[True, False],
    precision=["autocast", "fp32"],
    settings=[
        ("weight", {}),
        ("weight", {"keep_merged": True}),
        ("weight", {"need_weight": False}),
        ("weight", {"need_x": False, "rank": 9}),
        ("token", {}),
        ("token", {"dropout": 0.1}),
        ("token", {"dropout": 0.1, "need_x": False}),
        ("token", {"dropout": 0.1, "adds_to_x": True}),
        ("token", {"need_weight": False, "rank": 20}),
    ],
)
def test_calls_are_those_of_the_code(
    shim_operators: Any,
    asked: Callable[[], list[tuple[str, tuple[int, ...]]]],
    rows: tuple[int, ...],
    bias: bool,
    precision: str,
    settings: tuple[str, dict[str, Any]],
) -> None:
    route, changes = settings
    one = layer(rows, precision, bias=bias, **changes)
    for step in ("forward", "backward"):
        calls_of_layer(shim_operators, one, route, step)
        wanted = [
            (call.name, call.sizes)
            for call in layer_calls(one, route)
            if call.step == step and call.name != "cast"
        ]
        assert asked() == wanted


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("route", ["weight", "token"])
def test_a_gradient_that_is_added_to_is_read_once(route: str, rows: tuple[int, ...]) -> None:
    """By the weight route with different numbers of rows autograd reads two and writes one."""
    one = layer(rows, "autocast", dropout=0.1 if route == "token" else 0.0)
    alone, adding = (
        sum(call.moved for call in layer_calls(replace(one, adds_to_x=adds), route))
        for adds in (False, True)
    )
    size = one.total * one.in_features * one.activation
    by_autograd = route == "weight" and len(set(rows)) > 1
    assert adding - alone == (3 if by_autograd else 1) * size
    frozen = replace(one, adds_to_x=True, need_x=False)
    assert layer_calls(frozen, route) == layer_calls(replace(one, need_x=False), route)
