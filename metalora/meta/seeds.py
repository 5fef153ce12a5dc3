"""Random numbers as a pure function of what they are for."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """A seed in 0..2**63-1 that depends on ``purpose`` and ``numbers`` and on nothing else."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device, purpose: str, *numbers: int) -> torch.Generator:
    """A generator on ``device`` with the seed of `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(purpose, *numbers))
