"""Small problems with everything that training starts from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metalora.shallow import (
    Adapters,
    Network,
    initial_adapters,
    initial_network,
    sample_data,
    sample_problem,
)


@dataclass(frozen=True)
class Start:
    """What retraining takes."""

    x: Tensor
    y: Tensor
    network: Network
    adapters: Adapters

    def one_task(self) -> Start:
        """The first task alone, for fine-tuning."""
        first = Adapters(self.adapters.lora_A[..., 0, :, :], self.adapters.lora_B[..., 0, :, :])
        return Start(self.x[..., 0, :, :], self.y[..., 0, :], self.network, first)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def start(
    tasks: int = 2,
    count: int = 20,
    dim: int = 4,
    rank: int = 1,
    batch: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Start:
    """A problem, and starts whose adapters are not zero, so that every gradient counts."""
    generator = seeded(seed)
    common = {"generator": generator, "dtype": dtype}
    problem = sample_problem(tasks, dim, rank, batch_shape=batch, **common)  # type: ignore[arg-type]
    x, y = sample_data(problem.networks, count, generator=generator)
    network = initial_network(dim, batch_shape=batch, **common)  # type: ignore[arg-type]
    adapters = initial_adapters(rank, dim, batch_shape=(*batch, tasks), **common)  # type: ignore[arg-type]
    lora_B = 0.1 * torch.randn(adapters.lora_B.shape, generator=generator, dtype=torch.float64)
    return Start(x, y, network, Adapters(adapters.lora_A, lora_B.to(dtype)))
