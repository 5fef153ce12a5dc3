"""The linear model's training algorithms (paper, section 3 and D.1), many trainings at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import (
    check_constant,
    check_count,
    check_finite,
    check_generator,
    check_matrix_rank,
    check_nonnegative,
    check_values,
)
from metalora._draws import Draws
from metalora.linear.statistics import SufficientStatistics
from metalora.ops._trainings import check_converged, train

INITIAL_STD = 0.1  # of the entries of U_t at the start, and of U and V in fine-tuning


@dataclass(frozen=True)
class RetrainResult:
    """What retraining leaves.

    Attributes:
        weight: A, [..., d, d].
        factors: U_t of the tasks' adapters U_t U_tᵀ, [..., T, d, k]; None for standard retraining.
        losses: mean over the tasks of L_t = 1/(2N) Σ ‖y − (A + U_t U_tᵀ) x‖² at the point where
            each step takes the gradient of A, that is, before the step on A and, in LoRA-ML, after
            the inner steps on the U_t; [..., steps].
    """

    weight: Tensor
    factors: Tensor | None
    losses: Tensor


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning leaves.

    Attributes:
        factors: U and V of the adapter U Vᵀ, [..., d, r] each.
        losses: L = 1/(2n) Σ ‖y − (A + U Vᵀ) x‖² before each step, [..., steps].
        errors: prediction error ‖X (A + U Vᵀ − M)ᵀ‖_F² before the first and after every step,
            [..., steps + 1]; None if no truth M was given.
    """

    factors: tuple[Tensor, Tensor]
    losses: Tensor
    errors: Tensor | None


def lora_ml(
    stats: SufficientStatistics,
    rank: int,
    *,
    outer_steps: int = 3000,
    inner_steps: int = 10,
    outer_lr: float = 0.03,
    inner_lr: float = 0.003,
    initial_weight: Tensor | None = None,
    initial_factors: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RetrainResult:
    """LoRA-ML with symmetric adapters (paper, eq. 6 and 14) by gradient descent.

    Each outer step takes ``inner_steps`` gradient steps on every U_t with A fixed, on the task's
    loss, then one on A, on the mean loss of all tasks:
    U_t ← U_t − inner_lr/N · (R_t + R_tᵀ) U_t and A ← A − outer_lr/(N T) · Σ_t R_t, where
    R_t = (A + U_t U_tᵀ) G_t − C_t. A step costs O(T d² (d + k)), whatever N is.

    Args:
        stats: statistics of the retraining tasks, gram [..., T, d, d].
        rank: k, from 1 to d.
        outer_steps: number of steps on A.
        inner_steps: number of steps on every U_t before each of them.
        outer_lr: step size of A.
        inner_lr: step size of the U_t.
        initial_weight: start of A, [..., d, d]; None is zero.
        initial_factors: start of the U_t, [..., T, d, k]; None draws entries from N(0, 0.1²).
        generator: source of randomness for that; None is torch's own.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or numbers.
        DivergedError: a training diverged; names the step.
    """
    name = "lora_ml"
    _check_tasks(name, stats)
    tasks, dim = stats.gram.shape[-3:-1]
    check_matrix_rank(name, rank, dim)
    check_count(name, "outer_steps", outer_steps, minimum=0)
    check_count(name, "inner_steps", inner_steps, minimum=0)
    check_nonnegative(name, "outer_lr", outer_lr)
    check_nonnegative(name, "inner_lr", inner_lr)
    check_generator(name, generator)
    batch = stats.batch_shape[:-1]
    weight = _start_weight(name, stats, initial_weight)
    factors = _start(
        name, "initial_factors", stats, (*batch, tasks, dim, rank), initial_factors, generator
    )
    weight, factors, losses, diverged_at = train(
        "linear_lora_ml",
        batch,
        (stats.gram, stats.cross, stats.energy, weight, factors),
        stats.count,
        outer_steps,
        inner_steps,
        float(outer_lr),
        float(inner_lr),
    )
    check_converged(name, diverged_at, outer_steps, "outer_lr or inner_lr")
    return RetrainResult(weight, factors, losses)


def standard(
    stats: SufficientStatistics,
    *,
    steps: int = 3000,
    lr: float = 0.03,
    initial_weight: Tensor | None = None,
) -> RetrainResult:
    """Standard retraining (paper, eq. 1): gradient descent on A and the mean loss of all tasks.

    Args:
        stats: statistics of the retraining tasks, gram [..., T, d, d].
        steps: number of steps.
        lr: step size.
        initial_weight: start of A, [..., d, d]; None is zero.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or numbers.
        DivergedError: a training diverged; names the step.
    """
    name = "standard"
    _check_tasks(name, stats)
    check_count(name, "steps", steps, minimum=0)
    check_nonnegative(name, "lr", lr)
    weight = _start_weight(name, stats, initial_weight)
    weight, losses, diverged_at = train(
        "linear_standard",
        stats.batch_shape[:-1],
        (stats.gram, stats.cross, stats.energy, weight),
        stats.count,
        steps,
        float(lr),
    )
    check_converged(name, diverged_at, steps, "lr")
    return RetrainResult(weight, None, losses)


def finetune_lora(
    stats: SufficientStatistics,
    weight: Tensor,
    rank: int,
    *,
    steps: int,
    lr: float = 0.005,
    initial_factors: tuple[Tensor, Tensor] | None = None,
    truth: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> FinetuneResult:
    """Fine-tunes a frozen A on a task with an adapter U Vᵀ (paper, eq. 3) by gradient descent.

    U and V move at the same time: U ← U − lr/n · R V and V ← V − lr/n · Rᵀ U with
    R = (A + U Vᵀ) G − C.

    Args:
        stats: statistics of the task's n samples, gram [..., d, d].
        weight: A, [..., d, d] with the same leading dimensions, or the first of them: one A is
            then fine-tuned on each of the others.
        rank: r, from 1 to d.
        steps: number of steps.
        lr: step size of U and V.
        initial_factors: start of (U, V), [..., d, r] each; None draws entries from N(0, 0.1²).
        truth: M, of a shape as ``weight`` may have: record the prediction error at every step.
        generator: source of randomness for the start; None is torch's own.

    Raises:
        ValueError, TypeError: wrong shapes, dtypes, devices or numbers.
        DivergedError: a training diverged; names the step.
    """
    name = "finetune_lora"
    _check_statistics(name, stats)
    batch = stats.batch_shape
    weight = _check_matrix(name, "weight", weight, stats)
    if truth is not None:
        truth = _check_matrix(name, "truth", truth, stats)
    check_matrix_rank(name, rank, stats.dim)
    check_count(name, "steps", steps, minimum=0)
    check_nonnegative(name, "lr", lr)
    check_generator(name, generator)
    if initial_factors is not None and (
        not isinstance(initial_factors, (tuple, list)) or len(initial_factors) != 2
    ):
        raise TypeError(f"{name}: initial_factors must be a pair (U, V) of tensors or None")
    shape = (*batch, stats.dim, rank)
    start_u, start_v = (None, None) if initial_factors is None else initial_factors
    u = _start(name, "initial_factors[0]", stats, shape, start_u, generator)
    v = _start(name, "initial_factors[1]", stats, shape, start_v, generator)
    u, v, losses, errors, diverged_at = train(
        "linear_finetune_lora",
        batch,
        (stats.gram, stats.cross, stats.energy, weight, u, v, truth),
        stats.count,
        steps,
        float(lr),
    )
    check_converged(name, diverged_at, steps, "lr")
    return FinetuneResult((u, v), losses, None if truth is None else errors)


def _check_statistics(function: str, stats: SufficientStatistics) -> None:
    if not isinstance(stats, SufficientStatistics):
        raise TypeError(
            f"{function}: stats must be SufficientStatistics, got {type(stats).__name__}; "
            "make them with sufficient_statistics(x, y)"
        )
    for argument in ("gram", "cross", "energy"):
        check_finite(function, f"stats.{argument}", getattr(stats, argument))
    gram = stats.gram
    tolerance = 1e-4 if gram.dtype == torch.float32 else 1e-10
    largest = float(gram.abs().amax()) if gram.numel() else 0.0
    if not torch.allclose(gram, gram.mT, rtol=0, atol=tolerance * largest):
        raise ValueError(f"{function}: stats.gram must be symmetric (it is a sum of x xᵀ)")


def _check_tasks(function: str, stats: SufficientStatistics) -> None:
    if isinstance(stats, SufficientStatistics) and (
        stats.gram.dim() < 3 or stats.gram.shape[-3] == 0
    ):
        raise ValueError(
            f"{function}: stats.gram must be [..., T, d, d] with T >= 1, "
            f"got {list(stats.gram.shape)}"
        )
    _check_statistics(function, stats)


def _check_matrix(
    function: str, argument: str, value: Tensor, stats: SufficientStatistics
) -> Tensor:
    """``value`` with the leading dimensions of the statistics; it may lack the last of them."""
    check_constant(function, argument, value, "stats.gram", stats.gram)
    wanted, batch = stats.gram.shape, stats.batch_shape
    leading = value.dim() - 2
    if value.shape[-2:] != wanted[-2:] or value.shape[:-2] != batch[:leading]:
        shape = ", ".join([*map(str, batch), f"d={stats.dim}", f"d={stats.dim}"])
        raise ValueError(
            f"{function}: {argument} must be [{shape}] as stats.gram is (or without the last of "
            f"the leading dimensions), got {list(value.shape)}"
        )
    check_finite(function, argument, value)
    missing = (1,) * (len(batch) - leading)
    return value.reshape(*batch[:leading], *missing, *wanted[-2:]).expand(wanted)


def _start_weight(function: str, stats: SufficientStatistics, given: Tensor | None) -> Tensor:
    shape = (*stats.batch_shape[:-1], stats.dim, stats.dim)
    if given is None:
        return stats.gram.new_zeros(shape)
    return check_values(function, "initial_weight", given, "stats.gram", stats.gram, shape)


def _start(
    function: str,
    argument: str,
    stats: SufficientStatistics,
    shape: tuple[int, ...],
    given: Tensor | None,
    generator: torch.Generator | None,
) -> Tensor:
    if given is None:
        draw = Draws(generator, stats.gram.dtype, stats.gram.device)
        return INITIAL_STD * draw.normal(*shape)
    return check_values(function, argument, given, "stats.gram", stats.gram, shape)
