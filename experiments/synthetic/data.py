"""Random generators and random starts of the trials."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.lib.seeding import seeded
from experiments.synthetic.settings import SWEEPS, Point
from metalora.linear import sample_data
from metalora.linear.data import CHUNK
from metalora.linear.training import INITIAL_STD


def trial_generator(point: Point, seed: int, trial: int) -> torch.Generator:
    """Returns a trial's generator, which depends on the seed, the point and the trial alone."""
    return seeded(seed, list(SWEEPS).index(point.vary), point.value, trial)


def linear_start(generator: torch.Generator, *shape: int) -> Tensor:
    """Draws the start of a factor of the linear model, in fp64."""
    return INITIAL_STD * torch.randn(shape, generator=generator, dtype=torch.float64)


def linear_samples(
    truth: Tensor, count: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draws the samples x and y, [..., count, d], of which `sample_statistics` keeps the sums."""
    parts = [
        sample_data(truth, min(CHUNK, count - begin), noise=noise, generator=generator)
        for begin in range(0, count, CHUNK)
    ]
    x, y = (torch.cat(part, dim=-2) for part in zip(*parts, strict=True))
    return x, y
