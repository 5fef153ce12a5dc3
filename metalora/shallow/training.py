"""The shallow network's training algorithms (paper, D.2), many trainings at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metalora._checks import (
    check_constant,
    check_count,
    check_finite,
    check_matrix_rank,
    check_nonnegative,
    check_shape,
    check_values,
)
from metalora.ops._trainings import check_converged, train
from metalora.shallow.data import check_network
from metalora.shallow.network import Adapters, Network


@dataclass(frozen=True)
class AdamW:
    """Settings of the optimiser, with the meaning and the defaults of ``torch.optim.AdamW``.

    Attributes:
        lr: learning rate.
        betas: decay rates of the gradient's first and second moments.
        eps: added to the second moment's root.
        weight_decay: decoupled; of all trained parameters, adapters included.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_nonnegative("AdamW", "lr", self.lr)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"AdamW: betas must be a pair of numbers, got {self.betas!r}")
        for i, beta in enumerate(self.betas):
            if check_nonnegative("AdamW", f"betas[{i}]", beta) >= 1:
                raise ValueError(f"AdamW: betas[{i}] must be below 1, got {beta!r}")
        check_nonnegative("AdamW", "eps", self.eps)
        check_nonnegative("AdamW", "weight_decay", self.weight_decay)

    def _numbers(self) -> tuple[float, ...]:
        values = (self.lr, *self.betas, self.eps, self.weight_decay)
        return tuple(float(value) for value in values)


@dataclass(frozen=True)
class RetrainResult:
    """What retraining leaves.

    Attributes:
        network: A [..., d, d] and c [..., d].
        adapters: the tasks' A_t [..., T, k, d] and B_t [..., T, d, k]; None for standard
            retraining.
        losses: mean squared error over the samples of all tasks before each epoch's step,
            [..., epochs].
    """

    network: Network
    adapters: Adapters | None
    losses: Tensor


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning leaves.

    Attributes:
        adapters: A_t [..., r, d] and B_t [..., d, r].
        losses: mean squared error before each epoch's step, [..., epochs].
    """

    adapters: Adapters
    losses: Tensor


def lora_ml(
    x: Tensor,
    y: Tensor,
    network: Network,
    adapters: Adapters,
    *,
    epochs: int = 40000,
    optimizer: AdamW = AdamW(),
) -> RetrainResult:
    """LoRA-ML (paper, eq. 6): A, c and the tasks' adapters together, one step an epoch.

    Args:
        x: inputs of the retraining tasks, [..., T, N, d].
        y: their outputs, [..., T, N].
        network: the start of A and c, with the leading dimensions of x.
        adapters: the start of A_t [..., T, k, d] and B_t [..., T, d, k], k at most d.
        epochs: number of steps; each takes all samples.
        optimizer: AdamW's settings.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or numbers.
        DivergedError: a training diverged; names the epoch.
    """
    weight, output, lora_A, lora_B, losses = _train(
        "lora_ml", "shallow_retrain", x, y, network, epochs, optimizer, adapters
    )
    return RetrainResult(Network(weight, output), Adapters(lora_A, lora_B), losses)


def standard(
    x: Tensor,
    y: Tensor,
    network: Network,
    *,
    epochs: int = 40000,
    optimizer: AdamW = AdamW(),
) -> RetrainResult:
    """Standard retraining (paper, eq. 1): A and c on the samples of all tasks.

    Arguments and errors as for ``lora_ml``.
    """
    weight, output, _, _, losses = _train(
        "standard", "shallow_retrain", x, y, network, epochs, optimizer
    )
    return RetrainResult(Network(weight, output), None, losses)


def finetune_lora(
    x: Tensor,
    y: Tensor,
    network: Network,
    adapters: Adapters,
    *,
    epochs: int = 15000,
    optimizer: AdamW = AdamW(),
) -> FinetuneResult:
    """LoRA on one task (paper, eq. 3): the adapter alone, A and c frozen.

    Arguments and errors as for ``lora_ml``, but that x [..., n, d], y [..., n] and the adapters
    A_t [..., r, d] and B_t [..., d, r] are of one task.
    """
    lora_A, lora_B, losses = _train(
        "finetune_lora", "shallow_finetune_lora", x, y, network, epochs, optimizer, adapters
    )
    return FinetuneResult(Adapters(lora_A, lora_B), losses)


def _train(
    function: str,
    operator: str,
    x: Tensor,
    y: Tensor,
    network: Network,
    epochs: int,
    optimizer: AdamW,
    *adapters: Adapters,
) -> list[Tensor]:
    """Checks the arguments and trains; returns what the operator does but ``diverged_at``."""
    task_dims = 1 if operator == "shallow_retrain" else 0
    batch = _check(function, x, y, network, epochs, optimizer, task_dims)
    lora_A, lora_B = None, None
    for given in adapters:
        lora_A, lora_B = _checked_adapters(function, given, x)
    tensors = x, y, network.weight, network.output, lora_A, lora_B
    *results, diverged_at = train(operator, batch, tensors, epochs, *optimizer._numbers())
    check_converged(function, diverged_at, epochs, "optimizer.lr")
    return results


def _check(
    function: str,
    x: Tensor,
    y: Tensor,
    network: Network,
    epochs: int,
    optimizer: AdamW,
    task_dims: int,
) -> torch.Size:
    """Checks all but the adapters; returns the leading dimensions of the trainings."""
    check_constant(function, "x", x)
    check_constant(function, "y", y, "x", x)
    wanted, sizes = ("[..., T, N, d]", "T, N and d") if task_dims else ("[..., n, d]", "n and d")
    if x.dim() < 2 + task_dims or 0 in x.shape[-2 - task_dims :]:
        raise ValueError(f"{function}: x must be {wanted} with {sizes} >= 1, got {list(x.shape)}")
    check_shape(function, "y", y, tuple(x.shape[:-1]))
    check_finite(function, "x", x)
    check_finite(function, "y", y)
    batch, dim = x.shape[: -2 - task_dims], x.shape[-1]
    check_network(function, network)
    check_constant(function, "network.weight", network.weight, "x", x)
    check_shape(function, "network.weight", network.weight, (*batch, dim, dim))
    check_count(function, "epochs", epochs, minimum=0)
    if not isinstance(optimizer, AdamW):
        raise TypeError(
            f"{function}: optimizer must be metalora.shallow.AdamW, got {type(optimizer).__name__}"
        )
    return batch


def _checked_adapters(function: str, adapters: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(adapters, Adapters):
        raise TypeError(f"{function}: adapters must be Adapters, got {type(adapters).__name__}")
    lora_A = check_constant(function, "adapters.lora_A", adapters.lora_A, "x", x)
    leading, dim = x.shape[:-2], x.shape[-1]
    if lora_A.dim() < 2:
        raise ValueError(
            f"{function}: adapters.lora_A must be [..., r, d={dim}], got {list(lora_A.shape)}"
        )
    rank = lora_A.shape[-2]
    check_matrix_rank(function, rank, dim)
    check_values(function, "adapters.lora_A", lora_A, "x", x, (*leading, rank, dim))
    lora_B = adapters.lora_B
    return lora_A, check_values(function, "adapters.lora_B", lora_B, "x", x, (*leading, dim, rank))
