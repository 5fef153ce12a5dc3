"""The shallow network and its adapters, and what training starts from (paper, D.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import check_choice, check_count, check_drawing, check_matrix_rank
from metalora._draws import Draws
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
        dim: d, features.
        init: "uniform", entries of A and c between −1/√d and 1/√d as in ``torch.nn.Linear``, or
            "normal", N(0, 1) as the true network's.
        batch_shape, generator, dtype, device: see `sample_problem`.

    Raises:
        ValueError, TypeError: an argument is of another kind or out of range.
    """
    name = "initial_network"
    check_choice(name, "init", init, INITIALIZATIONS)
    check_count(name, "dim", dim)
    batch = check_drawing(name, batch_shape, generator, dtype)
    source = Draws(generator, dtype, torch.device(device))
    draw = source.uniform if init == "uniform" else source.normal
    return Network(draw(*batch, dim, dim), draw(*batch, dim))


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
    check_matrix_rank(name, rank, dim)
    batch = check_drawing(name, batch_shape, generator, dtype)
    lora_A = Draws(generator, dtype, torch.device(device)).uniform(*batch, rank, dim)
    return Adapters(lora_A, lora_A.new_zeros(*batch, dim, rank))
