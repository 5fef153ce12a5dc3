"""Problems and samples of the shallow network (paper, D.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import (
    check_constant,
    check_count,
    check_drawing,
    check_finite,
    check_generator,
    check_matrix_rank,
    check_nonnegative,
)
from metalora._draws import Draws
from metalora.shallow.network import Network


@dataclass(frozen=True)
class ShallowProblem:
    """Ground truth of T retraining tasks and, as the last one, the test task.

    Attributes:
        base: A*, [..., d, d].
        factors: U_t*, [..., T + 1, d, k].
        output: c*, [..., d], the same for all tasks.
    """

    base: Tensor
    factors: Tensor
    output: Tensor

    @property
    def networks(self) -> Network:
        """The retraining tasks', A* + U_t* U_t*ᵀ and c*: weight [..., T, d, d]."""
        factors = self.factors[..., :-1, :, :]
        weight = self.base.unsqueeze(-3) + factors @ factors.mT
        return Network(weight, self.output.unsqueeze(-2).expand(weight.shape[:-1]))

    @property
    def test_network(self) -> Network:
        """The test task's: weight [..., d, d]."""
        factors = self.factors[..., -1, :, :]
        return Network(self.base + factors @ factors.mT, self.output)


def sample_problem(
    num_tasks: int,
    dim: int,
    rank: int,
    *,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> ShallowProblem:
    """Draws A*, U_1*, ..., U_{T+1}* and c* with independent N(0, 1) entries.

    Arguments and errors as for `metalora.linear.sample_problem`.
    """
    name = "sample_problem"
    check_count(name, "num_tasks", num_tasks)
    check_count(name, "dim", dim)
    check_matrix_rank(name, rank, dim)
    batch = check_drawing(name, batch_shape, generator, dtype)
    draw = Draws(generator, dtype, torch.device(device))
    return ShallowProblem(
        draw.normal(*batch, dim, dim),
        draw.normal(*batch, num_tasks + 1, dim, rank),
        draw.normal(*batch, dim),
    )


def sample_data(
    network: Network,
    count: int,
    *,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws samples y = cᵀ σ(A x) + ε with x ~ N(0, I) and ε ~ N(0, noise²).

    Args:
        network: A [..., d, d] and c [..., d].
        count: N, samples per network.
        noise: standard deviation of ε.
        generator: source of randomness; None is torch's own.

    Returns:
        x [..., N, d] and y [..., N], in the dtype and on the device of the network.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or numbers.
    """
    name = "sample_data"
    check_network(name, network)
    check_count(name, "count", count)
    check_nonnegative(name, "noise", noise)
    check_generator(name, generator)
    weight = network.weight
    draw = Draws(generator, weight.dtype, weight.device)
    x = draw.normal(*weight.shape[:-2], count, weight.shape[-1])
    y = network.predict(x)
    if noise:
        y += noise * draw.normal(*y.shape)
    return x, y


def check_network(function: str, network: Network) -> None:
    """Refuses what is not a network of finite numbers."""
    if not isinstance(network, Network):
        raise TypeError(f"{function}: network must be a Network, got {type(network).__name__}")
    weight = check_constant(function, "network.weight", network.weight)
    output = check_constant(function, "network.output", network.output, "network.weight", weight)
    if weight.dim() < 2 or weight.shape[-1] != weight.shape[-2] or not weight.shape[-1]:
        raise ValueError(
            f"{function}: network.weight must be [..., d, d] with d >= 1, got {list(weight.shape)}"
        )
    if output.shape != weight.shape[:-1]:
        raise ValueError(
            f"{function}: network.output must be {list(weight.shape[:-1])} as network.weight is "
            f"{list(weight.shape)}, got {list(output.shape)}"
        )
    check_finite(function, "network.weight", weight)
    check_finite(function, "network.output", output)
