"""Float32 products within a training are as precise as it says, and afterwards as they were."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from metalora.meta import (
    Callback,
    RoundLoader,
    TrainConfig,
    Training,
    matmul_precision,
    precision,
    standard,
)

BACKENDS: Any = torch.backends
START = ("highest", "none", "none")


def settings() -> tuple[str, str, str]:
    """torch's older setting, and the newer ones of CPUs and GPUs."""
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:
        legacy = "disagrees"
    return legacy, BACKENDS.mkldnn.matmul.fp32_precision, BACKENDS.cuda.matmul.fp32_precision


def reset() -> None:
    BACKENDS.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    BACKENDS.mkldnn.matmul.fp32_precision = BACKENDS.cuda.matmul.fp32_precision = "none"


@pytest.fixture(autouse=True)
def _as_it_starts() -> Iterator[None]:
    reset()
    assert settings() == START
    yield
    reset()


@pytest.mark.parametrize(
    ("name", "by_onednn", "within"),
    [
        ("default", True, START),
        ("ieee", False, ("highest", "ieee", "ieee")),
        ("ieee", True, ("disagrees", "bf16", "ieee")),
        ("tf32", True, ("high", "tf32", "tf32")),
        ("bf16", True, ("medium", "bf16", "tf32")),
    ],
)
def test_torch_is_set_within(
    monkeypatch: pytest.MonkeyPatch, name: str, by_onednn: bool, within: tuple[str, str, str]
) -> None:
    monkeypatch.setattr(precision, "exact_by_onednn", lambda: by_onednn)
    with matmul_precision(name):
        assert settings() == within
        with matmul_precision("bf16"):
            assert settings()[1:] == ("bf16", "tf32")
        assert settings()[1:] == within[1:]
    assert settings() == START


def test_it_is_restored_after_an_error() -> None:
    with pytest.raises(KeyError), matmul_precision("bf16"):
        raise KeyError
    assert settings() == START


def test_what_the_user_had_set_comes_back() -> None:
    torch.set_float32_matmul_precision("high")
    with matmul_precision("ieee"):
        pass
    assert settings() == ("high", "tf32", "tf32")


def test_what_was_inherited_stays_inherited() -> None:
    BACKENDS.fp32_precision = "tf32"
    with matmul_precision("bf16"):
        pass
    assert settings()[1:] == ("tf32", "tf32")
    BACKENDS.fp32_precision = "none"
    assert settings()[1:] == ("none", "none")


def test_an_unknown_precision() -> None:
    unknown = pytest.raises(ValueError, match="matmul_precision: precision must be one of")
    with unknown, matmul_precision("fp32"):
        pass
    with pytest.raises(ValueError, match="TrainConfig: matmul_precision must be one of"):
        TrainConfig(epochs=1, lr=0.1, matmul_precision="high")


class Seen(Callback):
    def __init__(self, error: type[Exception] | None) -> None:
        self.error, self.found = error, []  # type: ignore[var-annotated]

    def on_step(self, training: Training, loss: torch.Tensor) -> None:
        self.found.append(settings())
        if self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, KeyError])
def test_a_training_and_its_validation_run_so(error: type[Exception] | None) -> None:
    model = nn.Linear(3, 2)
    ids = torch.tensor([0, 0, 1, 1])
    rounds = RoundLoader(torch.randn(4, 3), ids, ids, batch_size=2)
    config = TrainConfig(epochs=1, lr=0.1, matmul_precision="bf16")
    seen = Seen(error)

    def validation(model: nn.Module) -> float:
        seen.found.append(settings())
        return 0.0

    if error:
        with pytest.raises(error):
            standard(model, rounds, config, callbacks=[seen])
    else:
        standard(model, rounds, config, callbacks=[seen], validation=validation)
    assert set(seen.found) == {("medium", "bf16", "tf32")}
    assert settings() == START


@pytest.mark.slow
def test_ieee_is_exact_on_this_cpu() -> None:
    a, b = torch.randn(2, 300, 300) - 0.5
    exact = a.double() @ b.double()
    default = (a @ b - exact).norm()
    with matmul_precision("ieee"):
        assert (a @ b - exact).norm() <= 2 * default
