"""Seeds as a pure function of their purpose."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
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
    """Restores the state of torch's generators on leaving, that of CUDA too if it is in use."""
    in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
    devices = list(range(torch.cuda.device_count())) if in_use else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        yield


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators on the CPU and on ``device``, as uint8 tensors."""
    found = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def restore_random_state(state: Mapping[str, torch.Tensor]) -> None:
    """Restores what `random_state` returned; of "cuda" that of the current device."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())
