from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from metalora.meta import DivergedError
from metalora.shallow import (
    AdamW,
    Adapters,
    Network,
    finetune_lora,
    lora_ml,
    standard,
)
from tests.shallow.problems import Start, start

pytestmark = pytest.mark.usefixtures("backend")

# (T, N, d, k): one task, fewer samples than a vector, sizes that fill none, full rank, many blocks
SHAPES = [(3, 100, 10, 1), (1, 3, 3, 2), (2, 9, 7, 7), (2, 33, 1, 1), (2, 200, 21, 3)]
OTHER = AdamW(lr=0.01, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.3)


def assert_same(actual: Any, expected: Any, rtol: float, atol: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("tasks", "count", "dim", "rank"), SHAPES)
@pytest.mark.parametrize("optimizer", [AdamW(), OTHER])
def test_iterates_are_those_of_autograd_and_torch_adamw(
    oracle: Callable[..., Any], tasks: int, count: int, dim: int, rank: int, optimizer: AdamW
) -> None:
    s = start(tasks, count, dim, rank)
    options: dict[str, Any] = {"epochs": 30, "optimizer": optimizer}
    network, adapters, losses = oracle(s.x, s.y, s.network, s.adapters, 30, optimizer)
    result = lora_ml(s.x, s.y, s.network, s.adapters, **options)
    assert result.adapters is not None
    assert_same(result.losses, losses, 1e-12)
    assert_same(result.network.weight, network.weight, 1e-9)
    assert_same(result.network.output, network.output, 1e-9)
    assert_same(result.adapters.lora_A, adapters.lora_A, 1e-9)
    assert_same(result.adapters.lora_B, adapters.lora_B, 1e-9)

    network, _, losses = oracle(s.x, s.y, s.network, None, 30, optimizer)
    plain = standard(s.x, s.y, s.network, **options)
    assert plain.adapters is None
    assert_same(plain.losses, losses, 1e-12)
    assert_same(plain.network.weight, network.weight, 1e-9)
    assert_same(plain.network.output, network.output, 1e-9)

    one = s.one_task()
    _, tuned, losses = oracle(
        *(s.x[:1], s.y[:1], s.network, Adapters(s.adapters.lora_A[:1], s.adapters.lora_B[:1])),
        *(30, optimizer),
        frozen=True,
    )
    result = finetune_lora(one.x, one.y, one.network, one.adapters, **options)
    assert_same(result.losses, losses, 1e-12)
    assert_same(result.adapters.lora_A, tuned.lora_A[0], 1e-9)
    assert_same(result.adapters.lora_B, tuned.lora_B[0], 1e-9)


@pytest.mark.exhaustive
def test_a_thousand_steps_at_the_papers_sizes(oracle: Callable[..., Any], backend: str) -> None:
    """Losses equal to 1e-6 relative over 1000 steps in float64; they agree to far less."""
    # The reference is that of the other tests; a shorter run of it will do.
    epochs, count = (1000, 1000) if backend == "native" else (150, 100)
    s = start(3, count, 10, 1)
    one = s.one_task()
    first = Adapters(s.adapters.lora_A[:1], s.adapters.lora_B[:1])
    pairs = [
        (
            lora_ml(s.x, s.y, s.network, s.adapters, epochs=epochs),
            oracle(s.x, s.y, s.network, s.adapters, epochs, AdamW()),
        ),
        (
            standard(s.x, s.y, s.network, epochs=epochs),
            oracle(s.x, s.y, s.network, None, epochs, AdamW()),
        ),
        (
            finetune_lora(one.x, one.y, one.network, one.adapters, epochs=epochs),
            oracle(s.x[:1], s.y[:1], s.network, first, epochs, AdamW(), frozen=True),
        ),
    ]
    for result, (_, _, losses) in pairs:
        assert_same(result.losses, losses, rtol=1e-9, atol=0)
        assert float(losses[-1]) < float(losses[0])


@pytest.mark.parametrize("method", ["lora-ml", "standard", "finetune"])
def test_float32_is_as_near_to_float64_as_pytorch(oracle: Callable[..., Any], method: str) -> None:
    double, single = (start(3, 150, 10, 2, dtype=d) for d in (torch.float64, torch.float32))
    exact, ours = run(method, double), run(method, single)
    adapters = None if method == "standard" else single.adapters
    x, y = single.x, single.y
    if method == "finetune":
        x, y = x[:1], y[:1]
        adapters = Adapters(single.adapters.lora_A[:1], single.adapters.lora_B[:1])
    plain = oracle(x, y, single.network, adapters, 100, AdamW(), frozen=method == "finetune")[2]

    def error(losses: torch.Tensor) -> float:
        return float((losses.double() / exact - 1).abs().max())

    assert ours.dtype == torch.float32
    assert error(ours) <= 2 * error(plain) + 1e-6


def run(method: str, s: Start, epochs: int = 100) -> torch.Tensor:
    """The losses of a training."""
    if method == "lora-ml":
        return lora_ml(s.x, s.y, s.network, s.adapters, epochs=epochs).losses
    if method == "standard":
        return standard(s.x, s.y, s.network, epochs=epochs).losses
    one = s.one_task()
    return finetune_lora(one.x, one.y, one.network, one.adapters, epochs=epochs).losses


@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30])
def test_saturated_hidden_units(oracle: Callable[..., Any], scale: float) -> None:
    s = start(2, 50, 5, 1)
    far = Network(scale * s.network.weight, s.network.output)
    _, _, losses = oracle(s.x, s.y, far, s.adapters, 20, AdamW())
    result = lora_ml(s.x, s.y, far, s.adapters, epochs=20)
    assert_same(result.losses, losses, 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_batches_are_separate_trainings(dtype: torch.dtype) -> None:
    s = start(2, 30, 6, 2, batch=(2, 3), dtype=dtype)
    whole = lora_ml(s.x, s.y, s.network, s.adapters, epochs=20)
    plain = standard(s.x, s.y, s.network, epochs=20)
    one = s.one_task()
    tuned = finetune_lora(one.x, one.y, whole.network, one.adapters, epochs=20)
    assert whole.losses.shape == (2, 3, 20) and tuned.losses.shape == (2, 3, 20)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    for i in np.ndindex(2, 3):
        network = Network(s.network.weight[i], s.network.output[i])
        adapters = Adapters(s.adapters.lora_A[i], s.adapters.lora_B[i])
        alone = lora_ml(s.x[i], s.y[i], network, adapters, epochs=20)
        assert_same(whole.network.weight[i], alone.network.weight, tolerance, tolerance)
        assert_same(whole.losses[i], alone.losses, tolerance, tolerance)
        other = standard(s.x[i], s.y[i], network, epochs=20)
        assert_same(plain.network.output[i], other.network.output, tolerance, tolerance)
        first = Adapters(one.adapters.lora_A[i], one.adapters.lora_B[i])
        again = finetune_lora(one.x[i], one.y[i], alone.network, first, epochs=20)
        assert_same(tuned.adapters.lora_B[i], again.adapters.lora_B, tolerance, tolerance)


def test_inputs_are_left_alone_and_layout_does_not_matter() -> None:
    s = start(2, 11, 5, 2, batch=(3,))
    tensors = (s.x, s.y, s.network.weight, s.network.output, s.adapters.lora_A, s.adapters.lora_B)
    before = [t.clone() for t in tensors]
    result = lora_ml(s.x, s.y, s.network, s.adapters, epochs=5)
    assert all(torch.equal(t, copy) for t, copy in zip(tensors, before, strict=True))
    x, y, weight, output, a, b = (t.mT.contiguous().mT for t in tensors)
    strided = lora_ml(x, y, Network(weight, output), Adapters(a, b), epochs=5)
    assert_same(strided.losses, result.losses, 1e-13)
    assert_same(strided.network.weight, result.network.weight, 1e-12)


def test_no_trainings_and_no_epochs() -> None:
    s = start(2, 5, 3, 1, batch=(1,))
    none = Network(s.network.weight[:0], s.network.output[:0])
    adapters = Adapters(s.adapters.lora_A[:0], s.adapters.lora_B[:0])
    assert lora_ml(s.x[:0], s.y[:0], none, adapters, epochs=4).losses.shape == (0, 4)
    s = start(2, 5, 3, 1)
    result = lora_ml(s.x, s.y, s.network, s.adapters, epochs=0)
    assert result.losses.shape == (0,)
    assert torch.equal(result.network.weight, s.network.weight)


@pytest.mark.parametrize("method", ["lora-ml", "standard", "finetune"])
def test_divergence_names_the_epoch_and_the_training(method: str) -> None:
    s = start(2, 10, 3, 1, batch=(3,), dtype=torch.float32)
    # The second training alone starts so far out that its loss overflows at the first step.
    s.network.output[1] = 1e30
    with pytest.raises(DivergedError) as caught:
        run(method, s, epochs=4)
    message = str(caught.value)
    assert "training [1] of [3]: diverged, not finite at step 1 of 4; lower optimizer.lr" in message
    assert "\n" not in message


def test_a_learning_rate_that_diverges_is_found_within_the_run() -> None:
    s = start(2, 10, 3, 1)
    with pytest.raises(DivergedError, match=r"not finite at step \d+ of 2000; lower optimizer.lr"):
        standard(s.x, s.y, s.network, epochs=2000, optimizer=AdamW(lr=1e4))
