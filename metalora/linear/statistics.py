"""Sufficient statistics: all that the linear model's training needs to know of its data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import check_constant, check_count, check_finite, check_shape, check_square
from metalora.reference import linear as reference

_CHUNK = 8192  # samples a task at a time, so that a float64 copy of float32 data stays small


@dataclass(frozen=True)
class SufficientStatistics:
    """Sums over the N samples of a task. The statistics of two halves of the data add up.

    Attributes:
        gram: Σ x xᵀ, [..., T, d, d].
        cross: Σ y xᵀ, [..., T, d, d].
        energy: Σ ‖y‖², [..., T]; only the losses depend on it.
        count: N, the number of samples of each task.

    Raises:
        ValueError, TypeError: the shapes, dtypes or devices do not fit together.
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor
    count: int

    def __post_init__(self) -> None:
        name = "SufficientStatistics"
        check_square(name, "gram", check_constant(name, "gram", self.gram))
        for argument in ("cross", "energy"):
            check_constant(name, argument, getattr(self, argument), "gram", self.gram)
        check_shape(name, "cross", self.cross, tuple(self.gram.shape))
        check_shape(name, "energy", self.energy, tuple(self.gram.shape[:-2]))
        check_count(name, "count", self.count)

    @property
    def dim(self) -> int:
        """d, the number of entries of x and of y."""
        return self.gram.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """The leading dimensions, the tasks' among them."""
        return self.energy.shape

    def __add__(self, other: SufficientStatistics) -> SufficientStatistics:
        if not isinstance(other, SufficientStatistics):
            return NotImplemented
        name = "SufficientStatistics.__add__"
        check_constant(name, "the second gram", other.gram, "the first", self.gram)
        check_shape(name, "the second gram", other.gram, tuple(self.gram.shape))
        return SufficientStatistics(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.count + other.count,
        )

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> SufficientStatistics:
        """The same statistics on another device or in another dtype."""
        moved = [t.to(device=device, dtype=dtype) for t in (self.gram, self.cross, self.energy)]
        return SufficientStatistics(moved[0], moved[1], moved[2], self.count)

    @staticmethod
    def stack(parts: Sequence[SufficientStatistics]) -> SufficientStatistics:
        """Statistics of equal shapes and counts along a new first dimension.

        Raises:
            ValueError: there are none, or their counts or shapes differ.
        """
        if len({(p.count, p.gram.shape) for p in parts}) != 1:
            found = [(p.count, list(p.gram.shape)) for p in parts]
            raise ValueError(
                "SufficientStatistics.stack: parts must be one or more statistics of equal count "
                f"and shape, got {found}"
            )
        return SufficientStatistics(
            torch.stack([p.gram for p in parts]),
            torch.stack([p.cross for p in parts]),
            torch.stack([p.energy for p in parts]),
            parts[0].count,
        )


def sufficient_statistics(x: Tensor, y: Tensor) -> SufficientStatistics:
    """The sums Σ x xᵀ, Σ y xᵀ and Σ ‖y‖² over the samples of every task.

    Summed in float64 whatever the dtype of the data. For data that do not fit into memory, add the
    statistics of their parts, converted with ``.to(dtype=torch.float64)`` if there are many.

    Args:
        x: inputs, [..., T, N, d] (or [N, d]), float32 or float64.
        y: outputs, of the same shape, dtype and device.

    Returns:
        Statistics in the dtype of the data.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices; no samples; NaN or infinite values.
    """
    name = "sufficient_statistics"
    check_constant(name, "x", x)
    check_constant(name, "y", y, "x", x)
    if x.dim() < 2 or 0 in x.shape[-2:]:
        raise ValueError(f"{name}: x must be [..., T, N, d] with N, d >= 1, got {list(x.shape)}")
    if y.shape != x.shape:
        raise ValueError(f"{name}: y must be {list(x.shape)} as x is, got {list(y.shape)}")
    count, dim = x.shape[-2:]
    gram = x.new_zeros(*x.shape[:-2], dim, dim, dtype=torch.float64)
    cross = torch.zeros_like(gram)
    energy = gram.new_zeros(x.shape[:-2])
    for begin in range(0, count, _CHUNK):
        part_x = x[..., begin : begin + _CHUNK, :].double()
        part_y = y[..., begin : begin + _CHUNK, :].double()
        gram += part_x.mT @ part_x
        cross += part_y.mT @ part_x
        energy += part_y.square().sum((-2, -1))
    gram = (gram + gram.mT) / 2
    # The sums show what the data hide: NaN and infinity never cancel.
    check_finite(name, "x", gram)
    check_finite(name, "y", energy)
    return SufficientStatistics(gram.to(x.dtype), cross.to(x.dtype), energy.to(x.dtype), count)


def prediction_error(stats: SufficientStatistics, weight: Tensor, truth: Tensor) -> Tensor:
    """‖X (W − M)ᵀ‖_F² on the inputs X of the statistics (paper, D.1).

    Args:
        stats: statistics of the test task's samples, gram [..., d, d].
        weight: W, the adapted weight Â + U Vᵀ, broadcast against gram.
        truth: M, broadcast against gram.

    Returns:
        One number per batch entry, [...].

    Raises:
        ValueError, TypeError: wrong shapes, dtypes or devices.
    """
    for argument, value in (("weight", weight), ("truth", truth)):
        check_constant("prediction_error", argument, value, "stats.gram", stats.gram)
        if value.dim() < 2 or value.shape[-2:] != stats.gram.shape[-2:]:
            raise ValueError(
                f"prediction_error: {argument} must be [..., d={stats.dim}, d={stats.dim}], "
                f"got {list(value.shape)}"
            )
    return reference.prediction_error(stats.gram, weight, truth)
