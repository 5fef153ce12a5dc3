"""Random numbers as a pure function of what they are for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive_seed(purpose: str, *numbers: int) -> int:
    """A seed in 0..2**63-1 that depends on ``purpose`` and ``numbers`` and on nothing else."""
    text = ":".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(device: torch.device, purpose: str, *numbers: int) -> torch.Generator:
    """A generator on ``device`` with the seed of `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(purpose, *numbers))


@contextmanager
def own_random_state() -> Iterator[None]:
    """Gives torch's generators, of the CPU and of CUDA where it is in use, back as they were."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        yield
