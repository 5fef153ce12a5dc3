"""What the trials of a sweep draw from."""

from __future__ import annotations

import torch
from torch import Tensor

from experiments.lib.seeding import seeded
from experiments.synthetic.settings import SWEEPS, Point
from metalora.linear.training import INITIAL_STD


def trial_generator(point: Point, seed: int, trial: int) -> torch.Generator:
    """The source of all that one trial draws: the seed, the point and the trial alone decide."""
    return seeded(seed, list(SWEEPS).index(point.vary), point.value, trial)


def linear_start(generator: torch.Generator, *shape: int) -> Tensor:
    """Where a trainer of the linear model starts a factor, in fp64."""
    return INITIAL_STD * torch.randn(shape, generator=generator, dtype=torch.float64)
