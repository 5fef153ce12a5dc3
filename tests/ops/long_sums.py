"""Problems whose gradients are long sums, and how exact the sums must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
KINDS = ("constant", "cancelling")


def addends(kind: str, *shape: int) -> Tensor:
    """Numbers to be summed over the first dimension, hard to sum in their own precision.

    "constant": rounding errors that all have one sign. "cancelling": random numbers beside pairs
    ten thousand times as large, of opposite sign, in random order.
    """
    if kind == "constant":
        return torch.full(shape, 0.1)
    large = 1e4 * torch.randn(shape)
    order = torch.randperm(shape[0])
    half = shape[0] // 2
    large[order[half : 2 * half]] = -large[order[:half]]
    return torch.randn(shape) + large


def factors(kind: str, *shape: int) -> Tensor:
    """What addends are multiplied with."""
    return torch.full(shape, 0.1) if kind == "constant" else torch.randn(shape)


def worst(
    got: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    sizes: Sequence[Tensor],
) -> float:
    """The largest error in units of what is allowed: twice that of plain PyTorch, plus 2 eps.

    An error is relative to ``sizes``, what the sums would be of absolute values: where addends
    cancel, that is what rounding errors are proportional to.
    """
    ratios = [0.0]
    for result, usual, right, size in zip(got, plain, exact, sizes, strict=True):
        scale = size.double().norm().item()
        error, allowed = ((t.double() - right).norm().item() / scale for t in (result, usual))
        ratios.append(error / (2 * allowed + 2 * EPS) if error == error else float("inf"))
    return max(ratios)
