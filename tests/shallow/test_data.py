from __future__ import annotations

import pytest
import torch

from metalora.shallow import (
    Adapters,
    Network,
    initial_adapters,
    initial_network,
    sample_data,
    sample_problem,
)
from tests.shallow.problems import seeded

DOUBLE = torch.float64


def test_problem_is_the_papers() -> None:
    problem = sample_problem(3, 6, 2, batch_shape=(4, 5), generator=seeded(), dtype=DOUBLE)
    assert problem.base.shape == (4, 5, 6, 6) and problem.output.shape == (4, 5, 6)
    assert problem.networks.weight.shape == (4, 5, 3, 6, 6)
    assert problem.networks.output.shape == (4, 5, 3, 6)
    assert problem.test_network.weight.shape == (4, 5, 6, 6)
    all_weights = torch.cat([problem.networks.weight, problem.test_network.weight.unsqueeze(2)], 2)
    adapters = all_weights - problem.base.unsqueeze(2)
    torch.testing.assert_close(adapters, adapters.mT)
    assert bool((torch.linalg.matrix_rank(adapters, rtol=1e-10) == 2).all())
    assert torch.equal(problem.networks.output[..., 2, :], problem.output)
    values = torch.cat([t.flatten() for t in (problem.base, problem.factors, problem.output)])
    assert values.std() == pytest.approx(1, rel=0.05)


def test_samples_follow_the_network() -> None:
    network = sample_problem(1, 4, 1, generator=seeded(), dtype=DOUBLE).test_network
    x, y = sample_data(network, 100_000, noise=0.5, generator=seeded(1))
    hidden = 1 / (1 + torch.exp(-torch.einsum("ij,nj->ni", network.weight, x)))
    noise = y - torch.einsum("i,ni->n", network.output, hidden)
    assert noise.std() == pytest.approx(0.5, rel=0.01)
    assert noise.mean() == pytest.approx(0, abs=0.01)
    assert x.std() == pytest.approx(1, rel=0.01)
    x, y = sample_data(network, 10, noise=0, generator=seeded())
    torch.testing.assert_close(y, network.predict(x))


def test_starts() -> None:
    network = initial_network(50, batch_shape=(3,), generator=seeded(), dtype=DOUBLE)
    bound = 50**-0.5
    for values in (network.weight, network.output):
        assert bool((values.abs() <= bound).all())
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.1)
    normal = initial_network(50, init="normal", batch_shape=(3,), generator=seeded())
    assert normal.weight.std() == pytest.approx(1, rel=0.05)
    adapters = initial_adapters(2, 50, batch_shape=(3, 4), generator=seeded())
    assert adapters.lora_A.shape == (3, 4, 2, 50) and adapters.lora_B.shape == (3, 4, 50, 2)
    assert not adapters.lora_B.any() and bool(adapters.lora_A.any())
    tasks = Network(network.weight.unsqueeze(1).float(), network.output.unsqueeze(1).float())
    assert torch.equal(tasks.adapted(adapters).weight, tasks.weight.expand(3, 4, 50, 50))


def test_adapted_network() -> None:
    network = initial_network(5, generator=seeded(), dtype=DOUBLE)
    a, b = torch.randn(2, 5, dtype=DOUBLE), torch.randn(5, 2, dtype=DOUBLE)
    x = torch.randn(7, 5, dtype=DOUBLE)
    expected = (x @ network.weight.T + x @ a.T @ b.T).sigmoid() @ network.output
    torch.testing.assert_close(network.adapted(Adapters(a, b)).predict(x), expected)


def test_one_seed_gives_the_same_in_both_dtypes() -> None:
    double = sample_problem(2, 3, 1, generator=seeded(), dtype=DOUBLE)
    single = sample_problem(2, 3, 1, generator=seeded())
    assert torch.equal(double.base.float(), single.base)
    start = initial_network(3, generator=seeded(), dtype=DOUBLE)
    assert torch.equal(start.weight.float(), initial_network(3, generator=seeded()).weight)


EYE = torch.eye(3)
NETWORK = Network(EYE, EYE[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sample_problem(0, 3, 1), ValueError, "num_tasks must be an int >= 1, got 0"),
        (lambda: sample_problem(2, 3, 4), ValueError, "rank must be at most d = 3, got 4"),
        (lambda: sample_problem(2, 3.0, 1), TypeError, "dim must be an int"),
        (lambda: sample_problem(2, 3, 1, dtype=torch.int32), TypeError, "dtype must be"),
        (lambda: sample_problem(2, 3, 1, generator=0), TypeError, "generator must be"),
        (lambda: initial_adapters(4, 3), ValueError, "rank must be at most d = 3, got 4"),
        (lambda: initial_network(0), ValueError, "dim must be an int >= 1, got 0"),
        (
            lambda: initial_network(3, init="unifrom"),
            ValueError,
            "init must be one of ['uniform', 'normal'], got 'unifrom'; did you mean 'uniform'?",
        ),
        (lambda: sample_data(NETWORK, 0), ValueError, "count must be an int >= 1, got 0"),
        (lambda: sample_data(NETWORK, 5, noise=-1), ValueError, "noise must be a finite number"),
        (lambda: sample_data(EYE, 5), TypeError, "network must be a Network, got Tensor"),
        (
            lambda: sample_data(Network(EYE, EYE[0, :2]), 5),
            ValueError,
            "network.output must be [3] as network.weight is [3, 3], got [2]",
        ),
        (
            lambda: sample_data(Network(EYE[0], EYE[0]), 5),
            ValueError,
            "network.weight must be [..., d, d] with d >= 1, got [3]",
        ),
        (
            lambda: sample_data(Network(EYE / 0, EYE[0]), 5),
            ValueError,
            "network.weight must be finite",
        ),
    ],
)
def test_errors(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
