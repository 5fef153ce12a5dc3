"""The correctness gate: relative errors against float64, before any timing."""

from __future__ import annotations

import torch
from torch import Tensor


class GateError(AssertionError):
    """A version's results are not those of the reference."""


def check_parts(
    name: str, got: Tensor, exact: Tensor, tolerance: float, floor: float = 0.0
) -> float:
    """The largest relative error ‖got - exact‖ / ‖exact‖ of any part, got and exact [parts, ...].

    A part smaller than ``floor`` may have an error as if it were as large.

    Raises:
        GateError: if it is above the tolerance, or the shapes differ; names the result.
    """
    if got.shape != exact.shape:
        raise GateError(f"{name} is {list(got.shape)}, not {list(exact.shape)}")
    difference = (got.detach().double() - exact).reshape(len(exact), -1).norm(dim=1)
    size = exact.reshape(len(exact), -1).norm(dim=1).clamp_min(floor)
    error = float(torch.where(difference == 0, 0.0, difference / size).max())
    if not error <= tolerance:
        raise GateError(f"{name} has a relative error of {error:.1e}, above {tolerance:.0e}")
    return error
