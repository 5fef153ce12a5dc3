"""Problems and samples of the linear model (paper, section 3 and D.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import (
    check_constant,
    check_count,
    check_drawing,
    check_generator,
    check_matrix_rank,
    check_nonnegative,
    check_square,
)
from metalora._draws import Draws
from metalora.linear.statistics import SufficientStatistics, sufficient_statistics

CHUNK = 8192  # samples drawn at a time; another value draws other samples from the same seed


@dataclass(frozen=True)
class LinearProblem:
    """Ground truth of T retraining tasks and, as the last one, the test task.

    Attributes:
        base: A*, [..., d, d].
        factors: U_t*, [..., T + 1, d, k].
    """

    base: Tensor
    factors: Tensor

    @property
    def truths(self) -> Tensor:
        """M_t = A* + U_t* U_t*ᵀ of the retraining tasks, [..., T, d, d]."""
        return self._all_truths()[..., :-1, :, :]

    @property
    def test_truth(self) -> Tensor:
        """M_{T+1} of the test task, [..., d, d]."""
        return self._all_truths()[..., -1, :, :]

    def _all_truths(self) -> Tensor:
        return self.base.unsqueeze(-3) + self.factors @ self.factors.mT


def sample_problem(
    num_tasks: int,
    dim: int,
    rank: int,
    *,
    batch_shape: Sequence[int] = (),
    symmetric_base: bool = False,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> LinearProblem:
    """Draws A* and U_1*, ..., U_{T+1}* with independent N(0, 1) entries (paper, section 3).

    Args:
        num_tasks: T, the number of retraining tasks; the test task comes on top.
        dim: d, features.
        rank: k, at most d.
        batch_shape: leading dimensions: so many independent problems.
        symmetric_base: whether A* is (A + Aᵀ) / 2 of such an A, as in the authors' runs.
        generator: source of randomness; None is torch's own.
        dtype: float32 or float64; one seed gives the same problem in both.
        device: of the problem.

    Raises:
        ValueError, TypeError: a number is not an int or out of range.
    """
    name = "sample_problem"
    check_count(name, "num_tasks", num_tasks)
    check_count(name, "dim", dim)
    check_matrix_rank(name, rank, dim, name="dim")
    batch = check_drawing(name, batch_shape, generator, dtype)
    draw = Draws(generator, dtype, torch.device(device))
    base = draw.normal(*batch, dim, dim)
    if symmetric_base:
        base = (base + base.mT) / 2
    return LinearProblem(base, draw.normal(*batch, num_tasks + 1, dim, rank))


def sample_data(
    truth: Tensor,
    count: int,
    *,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws samples y = M x + ε with x ~ N(0, I) and ε ~ N(0, σ² I).

    Args:
        truth: M, [..., d, d].
        count: N, samples per matrix.
        noise: σ.
        generator: source of randomness; None is torch's own.

    Returns:
        x and y, [..., N, d] each, in the dtype and on the device of ``truth``.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or numbers.
    """
    _check_sampling("sample_data", truth, count, noise, generator)
    shape = (*truth.shape[:-2], count, truth.shape[-1])
    draw = Draws(generator, truth.dtype, truth.device)
    x = draw.normal(*shape)
    y = x @ truth.mT
    if noise:
        y += noise * draw.normal(*shape)
    return x, y


def sample_statistics(
    truth: Tensor,
    count: int,
    *,
    noise: float = 0.1,
    generator: torch.Generator | None = None,
) -> SufficientStatistics:
    """The sufficient statistics of samples as ``sample_data`` draws them, a part at a time.

    Takes as much memory for a million samples as for ten thousand. Arguments and errors as for
    ``sample_data``; the statistics have the batch dimensions of ``truth``.
    """
    _check_sampling("sample_statistics", truth, count, noise, generator)
    total: SufficientStatistics | None = None
    for begin in range(0, count, CHUNK):
        rows = min(CHUNK, count - begin)
        x, y = sample_data(truth, rows, noise=noise, generator=generator)
        part = sufficient_statistics(x.double(), y.double())
        total = part if total is None else total + part
    assert total is not None
    return total.to(dtype=truth.dtype)


def _check_sampling(
    function: str, truth: Tensor, count: int, noise: float, generator: torch.Generator | None
) -> None:
    check_square(function, "truth", check_constant(function, "truth", truth))
    check_count(function, "count", count)
    check_nonnegative(function, "noise", noise)
    check_generator(function, generator)
