"""The shallow network and its adapters, and what training starts from (paper, D.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import check_choice, check_count
from metalora._inputs import DTYPES, check_generator, randn
from metalora.reference import shallow as reference

INITIALIZATIONS = ("uniform", "normal")


@dataclass(frozen=True)
class Adapters:
    """Low-rank pairs B_t A_t on the first layer.

    Attributes:
        lora_A: [..., r, d].
        lora_B: [..., d, r].
    """

    lora_A: Tensor
    lora_B: Tensor


@dataclass(frozen=True)
class Network:
    """y = cᵀ σ(A x), σ the elementwise sigmoid.

    Attributes:
        weight: A, [..., d, d].
        output: c, [..., d].
    """

    weight: Tensor
    output: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """The outputs [..., N] for inputs x [..., N, d]."""
        return reference.predict(x, self.weight, self.output)

    def adapted(self, adapters: Adapters) -> Network:
        """The network with A + B_t A_t in place of A."""
        return Network(self.weight + adapters.lora_B @ adapters.lora_A, self.output)


def initial_network(
    dim: int,
    *,
    init: str = "uniform",
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Network:
    """Draws what retraining starts from.

    Args:
        dim: d.
        init: "uniform", entries of A and c between −1/√d and 1/√d as in ``torch.nn.Linear``, or
            "normal", N(0, 1) as the true network's.
        batch_shape: leading dimensions: so many independent networks.
        generator: source of randomness; None is torch's own.
        dtype: float32 or float64; one seed gives the same network in both.
        device: where it is to live.

    Raises:
        ValueError, TypeError: an argument is of another kind or out of range.
    """
    name = "initial_network"
    check_choice(name, "init", init, INITIALIZATIONS)
    check_count(name, "dim", dim)
    batch = check_drawing(name, batch_shape, generator, dtype)
    draw = _uniform if init == "uniform" else randn
    place = torch.device(device)
    return Network(
        draw((*batch, dim, dim), generator, dtype, place),
        draw((*batch, dim), generator, dtype, place),
    )


def initial_adapters(
    rank: int,
    dim: int,
    *,
    batch_shape: Sequence[int] = (),
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Adapters:
    """Draws adapters that change nothing yet, as PEFT does.

    Entries of lora_A are uniform between −1/√d and 1/√d, those of lora_B are zero. ``batch_shape``
    ends in T for the adapters of T tasks. Other arguments and errors as for ``initial_network``;
    ``rank`` is at most ``dim``.
    """
    name = "initial_adapters"
    check_count(name, "dim", dim)
    check_rank(name, rank, dim)
    batch = check_drawing(name, batch_shape, generator, dtype)
    lora_A = _uniform((*batch, rank, dim), generator, dtype, torch.device(device))
    return Adapters(lora_A, lora_A.new_zeros(*batch, dim, rank))


def check_rank(function: str, rank: int, dim: int) -> None:
    """Refuses what is no rank of a [d, d] matrix."""
    check_count(function, "rank", rank)
    if rank > dim:
        raise ValueError(f"{function}: rank must be at most d = {dim}, got {rank}")


def check_drawing(
    function: str,
    batch_shape: Sequence[int],
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> tuple[int, ...]:
    """Checks what every function that draws tensors takes; returns the batch shape."""
    check_generator(function, generator)
    if dtype not in DTYPES:
        raise TypeError(f"{function}: dtype must be torch.float32 or torch.float64, got {dtype}")
    return tuple(check_count(function, "each of batch_shape", size) for size in batch_shape)


def _uniform(
    shape: tuple[int, ...],
    generator: torch.Generator | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Uniform values between −1/√d and 1/√d, d the last size, drawn in float64."""
    source = generator.device if generator is not None else device
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64, device=source)
    return ((2 * drawn - 1) / math.sqrt(shape[-1])).to(device, dtype)
