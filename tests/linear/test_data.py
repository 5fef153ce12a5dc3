from __future__ import annotations

import pytest
import torch

from metalora.linear import sample_data, sample_problem, sample_statistics, sufficient_statistics


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_problem_is_the_papers() -> None:
    problem = sample_problem(3, 6, 2, batch_shape=(4, 5), generator=seeded())
    assert problem.base.shape == (4, 5, 6, 6)
    assert problem.factors.shape == (4, 5, 4, 6, 2)
    assert problem.truths.shape == (4, 5, 3, 6, 6)
    adapters = torch.cat([problem.truths, problem.test_truth.unsqueeze(2)], 2)
    adapters = adapters - problem.base.unsqueeze(2)
    torch.testing.assert_close(adapters, adapters.mT)
    assert bool((torch.linalg.matrix_rank(adapters, rtol=1e-10) == 2).all())


def test_a_symmetric_base_is_that_of_the_same_draw() -> None:
    plain, symmetric = (
        sample_problem(3, 6, 2, symmetric_base=choice, generator=torch.Generator().manual_seed(1))
        for choice in (False, True)
    )
    assert torch.equal(symmetric.base, symmetric.base.mT)
    assert torch.equal(symmetric.base, (plain.base + plain.base.mT) / 2)
    assert not torch.equal(plain.base, plain.base.mT)
    assert torch.equal(symmetric.factors, plain.factors)


def test_samples_follow_the_truth() -> None:
    truth = sample_problem(1, 4, 1, generator=seeded()).truths
    x, y = sample_data(truth, 100_000, noise=0.5, generator=seeded(1))
    noise = y - x @ truth.mT
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    assert x.std() == pytest.approx(1, rel=0.01)
    exact = sample_data(truth, 10, noise=0, generator=seeded())
    torch.testing.assert_close(exact[1], exact[0] @ truth.mT)


def test_streamed_statistics_are_those_of_the_samples() -> None:
    truth = sample_problem(2, 3, 1, generator=seeded()).truths
    streamed = sample_statistics(truth, 8000, generator=seeded(1))
    whole = sufficient_statistics(*sample_data(truth, 8000, generator=seeded(1)))
    torch.testing.assert_close(streamed.gram, whole.gram)
    torch.testing.assert_close(streamed.cross, whole.cross)
    long = sample_statistics(truth, 30000, generator=seeded(1))
    assert long.count == 30000
    torch.testing.assert_close(
        long.gram / 30000, torch.eye(3, dtype=torch.float64).expand(2, 3, 3), atol=0.05, rtol=0
    )


def test_one_seed_gives_one_problem_in_both_dtypes() -> None:
    double = sample_problem(2, 3, 1, generator=seeded())
    single = sample_problem(2, 3, 1, generator=seeded(), dtype=torch.float32)
    assert torch.equal(double.base.float(), single.base)
    assert not torch.equal(double.base, sample_problem(2, 3, 1, generator=seeded(1)).base)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sample_problem(0, 3, 1), ValueError, "num_tasks must be an int >= 1, got 0"),
        (lambda: sample_problem(2, 3, 4), ValueError, "rank must be at most dim = 3, got 4"),
        (lambda: sample_problem(2, 3.0, 1), TypeError, "dim must be an int"),
        (lambda: sample_problem(2, 3, 1, dtype=torch.int32), TypeError, "dtype must be"),
        (lambda: sample_problem(2, 3, 1, generator=0), TypeError, "generator must be"),
        (lambda: sample_data(torch.eye(3), 0), ValueError, "count must be an int >= 1"),
        (lambda: sample_data(torch.eye(3), 5, noise=-1), ValueError, "noise must be"),
        (lambda: sample_statistics(torch.ones(3), 5), ValueError, "truth must be [..., d, d]"),
    ],
)
def test_errors(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
