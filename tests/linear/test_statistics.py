from __future__ import annotations

import numpy as np
import pytest
import torch

from metalora.linear import SufficientStatistics, prediction_error, sufficient_statistics


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_sums_over_samples(batch: tuple[int, ...]) -> None:
    x, y = draw(*batch, 17, 4), draw(*batch, 17, 4, seed=1)
    stats = sufficient_statistics(x, y)
    assert stats.batch_shape == batch
    assert (stats.count, stats.dim) == (17, 4)
    for index in np.ndindex(*batch):
        xs, ys = x[index].numpy(), y[index].numpy()
        gram = sum(np.outer(a, a) for a in xs)
        cross = sum(np.outer(b, a) for a, b in zip(xs, ys, strict=True))
        np.testing.assert_allclose(stats.gram[index], gram, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(stats.cross[index], cross, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(stats.energy[index], sum(b @ b for b in ys), rtol=1e-13)


@pytest.mark.parametrize("split", [1, 8191, 8192, 12000])
def test_halves_add_up(split: int) -> None:
    x, y = draw(2, 20000, 3), draw(2, 20000, 3, seed=1)
    whole = sufficient_statistics(x, y)
    halves = sufficient_statistics(x[:, :split], y[:, :split]) + sufficient_statistics(
        x[:, split:], y[:, split:]
    )
    assert halves.count == 20000
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(
            getattr(halves, name), getattr(whole, name), rtol=1e-12, atol=1e-10
        )


def test_float32_data_are_summed_in_float64() -> None:
    x = draw(200_000, 2, dtype=torch.float32)
    exact = sufficient_statistics(x.double(), x.double())
    stats = sufficient_statistics(x, x)
    assert stats.gram.dtype == torch.float32
    torch.testing.assert_close(stats.gram, exact.gram.float(), rtol=0, atol=0)


def test_transposed_and_expanded_data() -> None:
    x = draw(4, 17).mT
    y = draw(1, 4).expand(17, 4)
    stats = sufficient_statistics(x, y)
    other = sufficient_statistics(x.contiguous(), y.contiguous())
    torch.testing.assert_close(stats.gram, other.gram)
    torch.testing.assert_close(stats.cross, other.cross)


def test_stack() -> None:
    parts = [sufficient_statistics(draw(3, 9, 2, seed=s), draw(3, 9, 2)) for s in range(2)]
    stacked = SufficientStatistics.stack(parts)
    assert stacked.batch_shape == (2, 3)
    assert torch.equal(stacked.gram[1], parts[1].gram)
    with pytest.raises(ValueError, match=r"stack: .*equal count"):
        SufficientStatistics.stack([parts[0], parts[0] + parts[1]])


def test_prediction_error_is_the_one_on_the_inputs() -> None:
    x, weight, truth = draw(2, 7, 5), draw(2, 5, 5, seed=1), draw(2, 5, 5, seed=2)
    stats = sufficient_statistics(x, x)
    expected = (x @ (weight - truth).mT).square().sum((-2, -1))
    torch.testing.assert_close(prediction_error(stats, weight, truth), expected)
    assert bool((prediction_error(stats, truth, truth) == 0).all())


def stats_of(gram: torch.Tensor) -> SufficientStatistics:
    return SufficientStatistics(gram, gram, gram[..., 0, 0], 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: sufficient_statistics(x, x[:, :3]), ValueError, "y must be [2, 5, 3] as x is"),
        (lambda x: sufficient_statistics(x[0, 0], x[0, 0]), ValueError, "x must be [..., T, N, d]"),
        (lambda x: sufficient_statistics(x[:, :0], x[:, :0]), ValueError, "N, d >= 1, got [2, 0,"),
        (lambda x: sufficient_statistics(x.int(), x), TypeError, "x must be float32 or float64"),
        (
            lambda x: sufficient_statistics(x, x.float()),
            TypeError,
            "y must have the dtype of x, torch.float64",
        ),
        (lambda x: sufficient_statistics(x.numpy(), x), TypeError, "x must be a tensor"),
        (lambda x: sufficient_statistics(x / 0, x), ValueError, "x must be finite"),
        (lambda x: sufficient_statistics(x, x * torch.nan), ValueError, "y must be finite"),
        (lambda x: sufficient_statistics(x.requires_grad_(), x), ValueError, "x requires grad"),
        (lambda x: stats_of(x), ValueError, "gram must be [..., d, d], got [2, 5, 3]"),
        (lambda x: stats_of(x[:, :3]) + stats_of(x[:1, :3]), ValueError, "second gram must be [2,"),
        (
            lambda x: prediction_error(stats_of(x[:, :3]), x[:, :2], x[:, :3]),
            ValueError,
            "weight must be [..., d=3, d=3], got [2, 2, 3]",
        ),
    ],
)
def test_errors_are_one_clear_line(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        call(draw(2, 5, 3))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
