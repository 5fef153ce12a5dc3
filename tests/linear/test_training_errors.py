from __future__ import annotations

from typing import Any

import pytest
import torch

from metalora.linear import (
    SufficientStatistics,
    finetune_lora,
    lora_ml,
    sample_problem,
    sample_statistics,
    standard,
)


@pytest.fixture(scope="module")
def stats() -> SufficientStatistics:
    truths = sample_problem(3, 4, 1, generator=torch.Generator().manual_seed(0)).truths
    return sample_statistics(truths, 20)


NAN = float("nan")
EYE = torch.eye(4, dtype=torch.float64)

RETRAIN = [
    ({"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
    ({"rank": 5}, ValueError, "rank must be at most d = 4, got 5"),
    ({"rank": True}, TypeError, "rank must be an int"),
    ({"outer_steps": -1}, ValueError, "outer_steps must be an int >= 0, got -1"),
    ({"inner_steps": 2.5}, TypeError, "inner_steps must be an int >= 0"),
    ({"outer_lr": NAN}, ValueError, "outer_lr must be a finite number >= 0, got nan"),
    ({"inner_lr": -0.1}, ValueError, "inner_lr must be a finite number >= 0, got -0.1"),
    ({"inner_lr": "fast"}, TypeError, "inner_lr must be a finite number"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None"),
    ({"initial_weight": EYE[:3]}, ValueError, "initial_weight must be [4, 4], got [3, 4]"),
    (
        {"initial_weight": EYE.float()},
        TypeError,
        "initial_weight must have the dtype of stats.gram, torch.float64",
    ),
    ({"initial_weight": EYE * NAN}, ValueError, "initial_weight must be finite"),
    ({"initial_factors": EYE}, ValueError, "initial_factors must be [3, 4, 1], got [4, 4]"),
    ({"initial_factors": [1]}, TypeError, "initial_factors must be a tensor, got list"),
]


@pytest.mark.parametrize(("change", "error", "message"), RETRAIN)
def test_lora_ml(
    stats: SufficientStatistics, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"rank": 1, "outer_steps": 2, **change}
    _raises(error, f"lora_ml: {message}", lambda: lora_ml(stats, **arguments))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"steps": -1}, ValueError, "steps must be an int >= 0, got -1"),
        ({"lr": NAN}, ValueError, "lr must be a finite number >= 0, got nan"),
        ({"initial_weight": EYE[0]}, ValueError, "initial_weight must be [4, 4], got [4]"),
    ],
)
def test_standard(
    stats: SufficientStatistics, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    _raises(error, f"standard: {message}", lambda: standard(stats, **change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rank": 9}, ValueError, "rank must be at most d = 4, got 9"),
        ({"lr": float("inf")}, ValueError, "lr must be a finite number >= 0, got inf"),
        ({"steps": None}, TypeError, "steps must be an int >= 0"),
        ({"weight": EYE[:2]}, ValueError, "weight must be [3, d=4, d=4] as stats.gram is"),
        ({"weight": EYE.numpy()}, TypeError, "weight must be a tensor, got ndarray"),
        ({"truth": EYE * NAN}, ValueError, "truth must be finite"),
        ({"initial_factors": EYE}, TypeError, "initial_factors must be a pair (U, V)"),
        ({"initial_factors": (EYE, EYE)}, ValueError, "initial_factors[0] must be [3, 4, 1]"),
        ({"weight": EYE.clone().requires_grad_()}, ValueError, "weight requires grad"),
    ],
)
def test_finetune_lora(
    stats: SufficientStatistics, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"weight": EYE, "rank": 1, "steps": 2, **change}
    _raises(error, f"finetune_lora: {message}", lambda: finetune_lora(stats, **arguments))


def test_statistics_that_cannot_be(stats: SufficientStatistics) -> None:
    one = SufficientStatistics(EYE, EYE, EYE[0, 0], 3)
    wanted = "standard: stats.gram must be [..., T, d, d] with T >= 1, got [4, 4]"
    _raises(ValueError, wanted, lambda: standard(one))
    _raises(TypeError, "standard: stats must be", lambda: standard(EYE))  # type: ignore[arg-type]
    crooked = SufficientStatistics(stats.gram.triu(), stats.cross, stats.energy, 20)
    _raises(ValueError, "stats.gram must be symmetric", lambda: standard(crooked))
    holed = SufficientStatistics(stats.gram, stats.cross / 0, stats.energy, 20)
    _raises(ValueError, "stats.cross must be finite", lambda: lora_ml(holed, 1))


def _raises(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
