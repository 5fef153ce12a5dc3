from __future__ import annotations

from typing import Any

import pytest
import torch

from metalora.shallow import (
    AdamW,
    Adapters,
    Network,
    finetune_lora,
    lora_ml,
    standard,
)
from tests.shallow.problems import start

NAN = float("nan")
S = start(tasks=3, count=5, dim=4, rank=1)
WEIGHT, OUTPUT = S.network.weight, S.network.output
A, B = S.adapters.lora_A, S.adapters.lora_B
WIDE = torch.zeros(3, 5, 4, dtype=torch.float64)

RETRAIN = [
    ({"x": S.x[0]}, ValueError, "x must be [..., T, N, d] with T, N and d >= 1, got [5, 4]"),
    ({"x": S.x[:0]}, ValueError, "x must be [..., T, N, d] with T, N and d >= 1, got [0, 5, 4]"),
    ({"x": S.x[:, :0]}, ValueError, "x must be [..., T, N, d] with T, N and d >= 1, got [3, 0, 4]"),
    ({"x": S.x.numpy()}, TypeError, "x must be a tensor, got ndarray"),
    ({"x": S.x.int()}, TypeError, "x must be float32 or float64, got torch.int32"),
    ({"x": S.x * NAN}, ValueError, "x must be finite, got NaN or infinite entries"),
    ({"x": S.x.clone().requires_grad_()}, ValueError, "x requires grad"),
    ({"y": S.y / 0}, ValueError, "y must be finite"),
    ({"y": S.y[:2]}, ValueError, "y must be [3, 5], got [2, 5]"),
    ({"y": S.y.float()}, TypeError, "y must have the dtype of x, torch.float64, got torch.float32"),
    ({"network": WEIGHT}, TypeError, "network must be a Network, got Tensor"),
    ({"network": Network(WEIGHT[:3, :3], OUTPUT[:3])}, ValueError, "network.weight must be [4, 4]"),
    ({"network": Network(WEIGHT, OUTPUT * NAN)}, ValueError, "network.output must be finite"),
    (
        {"network": Network(WEIGHT.float(), OUTPUT.float())},
        TypeError,
        "network.weight must have the dtype of x, torch.float64",
    ),
    ({"adapters": A}, TypeError, "adapters must be Adapters, got Tensor"),
    ({"adapters": Adapters(WIDE, WIDE.mT)}, ValueError, "rank must be at most d = 4, got 5"),
    ({"adapters": Adapters(A[:, :0], B[..., :0])}, ValueError, "rank must be an int >= 1, got 0"),
    ({"adapters": Adapters(A[:2], B)}, ValueError, "adapters.lora_A must be [3, 1, 4]"),
    ({"adapters": Adapters(A, A)}, ValueError, "adapters.lora_B must be [3, 4, 1], got [3, 1, 4]"),
    ({"adapters": Adapters(A[0, 0], B)}, ValueError, "adapters.lora_A must be [..., r, d=4]"),
    ({"adapters": Adapters(A, B / 0)}, ValueError, "adapters.lora_B must be finite"),
    ({"epochs": -1}, ValueError, "epochs must be an int >= 0, got -1"),
    ({"epochs": 1.5}, TypeError, "epochs must be an int >= 0, got float 1.5"),
    ({"optimizer": 1e-3}, TypeError, "optimizer must be metalora.shallow.AdamW, got float"),
]


@pytest.mark.parametrize(("change", "error", "message"), RETRAIN)
def test_retraining(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": S.x, "y": S.y, "network": S.network, "epochs": 2, **change}
    adapters = arguments.pop("adapters", S.adapters)
    call = lambda: lora_ml(adapters=adapters, **arguments)  # noqa: E731
    raises(error, f"lora_ml: {message}", call)
    if "adapters" not in change:
        raises(error, f"standard: {message}", lambda: standard(**arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": S.x}, ValueError, "y must be [3, 5], got [5]"),
        ({"x": S.x[0, 0]}, ValueError, "x must be [..., n, d] with n and d >= 1, got [4]"),
        ({"adapters": S.adapters}, ValueError, "adapters.lora_A must be [1, 4], got [3, 1, 4]"),
    ],
)
def test_finetuning(change: dict[str, Any], error: type[Exception], message: str) -> None:
    one = S.one_task()
    arguments = {"x": one.x, "y": one.y, "network": one.network, "adapters": one.adapters, **change}
    raises(error, f"finetune_lora: {message}", lambda: finetune_lora(**arguments, epochs=2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a finite number >= 0, got str"),
        ({"betas": 0.9}, TypeError, "betas must be a pair of numbers, got 0.9"),
        ({"betas": (0.9, 1)}, ValueError, "betas[1] must be below 1, got 1"),
        ({"betas": (-0.1, 0.9)}, ValueError, "betas[0] must be a finite number >= 0, got -0.1"),
        ({"eps": NAN}, ValueError, "eps must be a finite number >= 0, got nan"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be a finite number >= 0"),
    ],
)
def test_optimizer(change: dict[str, Any], error: type[Exception], message: str) -> None:
    raises(error, f"AdamW: {message}", lambda: AdamW(**change))


def raises(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
