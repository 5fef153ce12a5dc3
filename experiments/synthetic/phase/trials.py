"""The trainings behind one cell of a phase diagram, all trials at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.lib.machine import one_thread
from experiments.lib.seeding import seeded
from experiments.synthetic.data import linear_start
from experiments.synthetic.phase.settings import PhaseSettings
from metalora.linear import (
    LinearProblem,
    RetrainResult,
    finetune_lora,
    lora_ml,
    sample_data,
    sample_problem,
    sufficient_statistics,
)
from metalora.linear.theory import population_statistics

Outcome = Mapping[str, Tensor]  # by metric, [trials]


def recover_base(num_tasks: int, rank: int, settings: PhaseSettings) -> Outcome:
    """Measures how far LoRA-ML on T tasks ends from A*: ‖Â − A*‖_F / ‖A*‖_F."""
    drawn = _draw(num_tasks, rank, settings)
    retrained = _retrain(drawn, rank, settings)
    return _outcome(retrained.weight, drawn.problem.base, retrained.losses)


def recover_test_task(
    num_tasks: int, samples: Sequence[int], rank: int, settings: PhaseSettings
) -> dict[int, Outcome]:
    """Measures how far LoRA on n noiseless samples ends from the test task, after LoRA-ML.

    Returns:
        For every n the error ‖Â + U Vᵀ − M‖_F / ‖M‖_F. The samples of a smaller n are the first of
        those of a larger one.
    """
    drawn = _draw(num_tasks, rank, settings)
    truth = drawn.problem.test_truth
    with one_thread():
        draws = [
            sample_data(truth[i], max(samples), noise=0.0, generator=generator)
            for i, generator in enumerate(drawn.generators)
        ]
        starts = [linear_start(g, 2, settings.dim, rank) for g in drawn.generators]
    x, y = (torch.stack(parts) for parts in zip(*draws, strict=True))
    start = torch.stack(starts, 1).to(settings.device)
    weight = _retrain(drawn, rank, settings).weight
    outcomes = {}
    for count in samples:
        result = finetune_lora(
            sufficient_statistics(x[:, :count], y[:, :count]).to(settings.device),
            weight,
            rank,
            steps=settings.finetune_steps,
            lr=settings.finetune_lr,
            initial_factors=(start[0], start[1]),
        )
        u, v = result.factors
        outcomes[count] = _outcome(weight + u @ v.mT, truth, result.losses)
    return outcomes


@dataclass(frozen=True)
class _Drawn:
    """Problems of all trials, the starts of their U_t [trials, T, d, k], and what draws the rest.

    A trial's numbers depend on the seed, T, k and the trial alone.
    """

    problem: LinearProblem
    factors: Tensor
    generators: Sequence[torch.Generator]


def _draw(num_tasks: int, rank: int, settings: PhaseSettings) -> _Drawn:
    generators = [seeded(settings.seed, num_tasks, rank, trial) for trial in range(settings.trials)]
    with one_thread():
        problems = [sample_problem(num_tasks, settings.dim, rank, generator=g) for g in generators]
        factors = [linear_start(g, num_tasks, settings.dim, rank) for g in generators]
    problem = LinearProblem(
        torch.stack([p.base for p in problems]), torch.stack([p.factors for p in problems])
    )
    return _Drawn(problem, torch.stack(factors), generators)


def _retrain(drawn: _Drawn, rank: int, settings: PhaseSettings) -> RetrainResult:
    """Runs LoRA-ML on the population loss (paper, eq. 14)."""
    return lora_ml(
        population_statistics(drawn.problem.truths).to(settings.device),
        rank,
        outer_steps=settings.outer_steps,
        inner_steps=settings.inner_steps,
        outer_lr=settings.outer_lr,
        inner_lr=settings.inner_lr,
        initial_factors=drawn.factors.to(settings.device),
    )


def _outcome(matrix: Tensor, truth: Tensor, losses: Tensor) -> Outcome:
    """Returns the error of matrix [trials, d, d], and what its losses [trials, steps] say.

    ``remaining_loss`` is the last loss over the first, ``late_progress`` the part by which it fell
    in the last tenth of the steps.
    """
    matrix, losses = matrix.cpu(), losses.cpu().clamp_min(0)  # rounding goes below zero
    last, before = losses[:, -1], losses[:, -1 - losses.shape[1] // 10]
    return {
        "relative_error": (matrix - truth).norm(dim=(-2, -1)) / truth.norm(dim=(-2, -1)),
        "remaining_loss": last / losses[:, 0],
        "late_progress": torch.where(before > 0, 1 - last / before, 0),
    }
