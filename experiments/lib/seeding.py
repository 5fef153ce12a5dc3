"""Random numbers that depend on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import numpy as np
import torch


def seeded(*entropy: int) -> torch.Generator:
    """Returns a generator of its own for every tuple of numbers, such as (seed, trial)."""
    state = np.random.SeedSequence(entropy).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))
