"""Random tensors, drawn in float64: one seed gives the same values in every dtype."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Draws:
    """A source of random tensors of one dtype on one device; None is torch's own generator."""

    generator: torch.Generator | None
    dtype: torch.dtype
    device: torch.device

    def normal(self, *shape: int) -> Tensor:
        """Standard normal values."""
        return torch.randn(shape, **self._source()).to(self.device, self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform values between −1/√d and 1/√d, with d the last size."""
        drawn = 2 * torch.rand(shape, **self._source()) - 1
        return (drawn / math.sqrt(shape[-1])).to(self.device, self.dtype)

    def _source(self) -> dict[str, Any]:
        device = self.device if self.generator is None else self.generator.device
        return {"generator": self.generator, "dtype": torch.float64, "device": device}
