"""One clear line for every call that cannot be right, before anything is computed."""

from __future__ import annotations

import re

import pytest
import torch

from metalora import ops
from tests.ops.problems import problem


def call(**changes: object) -> torch.Tensor:
    p = problem((3, 4), (7, 5, 2), grad=False)
    arguments = {
        "x": p.x,
        "weight": p.weight,
        "bias": p.bias,
        "lora_A": p.lora_A,
        "lora_B": p.lora_B,
        "task_ptr": p.task_ptr,
    }
    return ops.lora_linear(**(arguments | changes))


CASES = {
    "x_shape": ({"x": torch.randn(7, 6).double()}, ValueError, "x must be [M, in=7], got [7, 6]"),
    "x_dim": ({"x": torch.randn(7).double()}, ValueError, "x must be [M, in=7], got [7]"),
    "x_integer": (
        {"x": torch.ones(7, 7, dtype=torch.int64)},
        TypeError,
        "x must be floating point (float32, float64, bfloat16 or float16), got torch.int64; "
        "convert it with .float()",
    ),
    "x_double": (
        {
            "weight": torch.randn(5, 7),
            "lora_A": torch.randn(2, 2, 7),
            "lora_B": torch.randn(2, 5, 2),
        },
        TypeError,
        "x must have the dtype of weight, torch.float32, got torch.float64",
    ),
    "no_tasks": (
        {"lora_A": torch.empty(0, 2, 7).double(), "lora_B": torch.empty(0, 5, 2).double()},
        ValueError,
        "at least one task and a rank of at least 1, got [0, 2, 7]",
    ),
    "x_list": ({"x": [[1.0]]}, TypeError, "x must be a tensor, got list"),
    "weight_none": ({"weight": None}, TypeError, "weight must be a tensor, got NoneType"),
    "x_dtype": (
        {"x": torch.randn(7, 7)},
        TypeError,
        "x must have the dtype of weight, torch.float64, got torch.float32; convert one",
    ),
    "weight_device": (
        {"weight": torch.empty(5, 7, device="meta", dtype=torch.float64)},
        ValueError,
        "weight must be on the device of x, cpu, got meta; move it with .to('cpu')",
    ),
    "A_shape": (
        {"lora_A": torch.randn(2, 7, 2).double()},
        ValueError,
        "lora_A must be [T, r, in=7], got [2, 7, 2]; is it transposed?",
    ),
    "B_shape": (
        {"lora_B": torch.randn(2, 2, 5).double()},
        ValueError,
        "lora_B must be [T=2, out=5, r=2], got [2, 2, 5]; is it transposed?",
    ),
    "short_x": (
        {"x": torch.randn(7, 7).bfloat16(), "weight": torch.randn(5, 7), "bias": torch.randn(5)},
        TypeError,
        "x must have the dtype of weight, torch.float32, got torch.bfloat16; convert one of them "
        "with .to(), or compute under torch.autocast",
    ),
    "B_dtype": (
        {"lora_B": torch.randn(2, 5, 2)},
        TypeError,
        "lora_B must have the dtype of weight, torch.float64, got torch.float32",
    ),
    "rank_zero": (
        {"lora_A": torch.empty(2, 0, 7).double(), "lora_B": torch.empty(2, 5, 0).double()},
        ValueError,
        "a rank of at least 1, got [2, 0, 7]",
    ),
    "bias_shape": (
        {"bias": torch.randn(4).double()},
        ValueError,
        "bias must be [out=5], got [4]",
    ),
    "ptr_short": (
        {"task_ptr": torch.tensor([0, 7])},
        ValueError,
        "task_ptr must be [T+1=3], got [2]",
    ),
    "ptr_dtype": (
        {"task_ptr": torch.tensor([0, 3, 7], dtype=torch.int32)},
        TypeError,
        "task_ptr must be an int64 tensor [T+1=3] of row offsets, got torch.int32",
    ),
    "ptr_grad": (
        {"task_ptr": torch.tensor([0.0, 3.0, 7.0], requires_grad=True)},
        TypeError,
        "got torch.float32 that requires grad",
    ),
    "ptr_list": ({"task_ptr": [0, 3, 7]}, TypeError, "task_ptr must be an int64 tensor"),
    "ptr_end": (
        {"task_ptr": torch.tensor([0, 3, 6])},
        ValueError,
        "task_ptr must start at 0 and end at M=7, got 0 and 6",
    ),
    "ptr_start": (
        {"task_ptr": torch.tensor([1, 3, 7])},
        ValueError,
        "task_ptr must start at 0 and end at M=7, got 1 and 7",
    ),
    "ptr_decreasing": (
        {"task_ptr": torch.tensor([0, 8, 7])},
        ValueError,
        "task_ptr must not decrease, but task_ptr[1]=8 is above task_ptr[2]=7",
    ),
    "dropout_one": ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    "dropout_nan": ({"dropout_p": float("nan")}, ValueError, "dropout_p must be in [0, 1)"),
    "seed_negative": (
        {"dropout_p": 0.1, "seed": -1},
        ValueError,
        "seed must be in [0, 2**63), got -1",
    ),
    "seed_float": (
        {"dropout_p": 0.1, "seed": 1.5},
        TypeError,
        "seed must be an int or an int64 scalar tensor, got float",
    ),
    "scaling_nan": (
        {"scaling": float("nan")},
        ValueError,
        "scaling must be finite, got nan",
    ),
    "x_scalar": (
        {"x": torch.tensor(1.0).double(), "weight": torch.randn(99, 99).double()},
        ValueError,
        "x must be [M, in=99], got []",
    ),
    "scaling": ({"scaling": "2"}, TypeError, "scaling must be a number, got str"),
    "route": (
        {"route": "wieght"},
        ValueError,
        "route must be one of ['auto', 'weight', 'token', 'reference'], got 'wieght'; did you "
        "mean 'weight'?",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message(name: str) -> None:
    changes, kind, text = CASES[name]
    with pytest.raises(kind, match=re.escape(text)) as caught:
        call(**changes)
    message = str(caught.value)
    assert message.startswith("lora_linear: ")
    assert "\n" not in message


@pytest.mark.parametrize("route", ["auto", "reference"])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "lora_A", "lora_B", "task_ptr"])
def test_a_tensor_on_another_device(name: str, route: str) -> None:
    """Among CPU tensors a meta tensor would reach the fake kernel, which computes nothing."""
    p = problem((3, 4), (7, 5, 2), grad=False)
    with pytest.raises(ValueError, match=r"^lora_linear: \w+ must be on .*the device of"):
        call(**{name: getattr(p, name).to("meta"), "route": route})


def test_seed_on_another_device() -> None:
    with pytest.raises(ValueError, match=r"^lora_linear: seed must be on cpu, got meta"):
        call(seed=torch.tensor(1, device="meta"), dropout_p=0.1)


@pytest.mark.parametrize("pointers", [[0, 1, 1], [0, 8, 7], [2, 3, 7]])
def test_reference_route_checks_task_ptr(pointers: list[int]) -> None:
    with pytest.raises(ValueError, match=r"^lora_linear: task_ptr must"):
        call(route="reference", task_ptr=torch.tensor(pointers))


def test_one_error_is_shown_not_a_chain() -> None:
    with pytest.raises(ValueError, match="x must be") as caught:
        call(x=torch.randn(7, 6).double())
    assert caught.value.__suppress_context__


def test_there_is_no_route_for_an_integer_x() -> None:
    p = problem(grad=False)
    with pytest.raises(TypeError, match=r"^lora_linear_route: x must be floating point"):
        ops.lora_linear_route(p.x.long(), p.weight, p.lora_A)


def test_weight_route_refuses_dropout(native: None) -> None:
    with pytest.raises(ValueError, match=r"route='weight' cannot apply dropout_p=0\.1"):
        call(route="weight", dropout_p=0.1)


def test_the_real_error_shows_under_autocast(native: None) -> None:
    p = problem((3, 4), (7, 5, 2), dtype=torch.float32, grad=False)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(ValueError, match=r"route='weight' cannot apply dropout_p=0\.1"),
    ):
        ops.lora_linear(*p.tensors, p.task_ptr, route="weight", dropout_p=0.1)


def test_the_call_itself_is_fine() -> None:
    assert call().shape == (7, 5)
