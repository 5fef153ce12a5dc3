"""All trials of one point of a sweep: problems, retraining with both methods, fine-tuning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from experiments.lib.machine import one_thread
from experiments.synthetic.data import linear_start, trial_generator
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.settings import METHODS, Point
from metalora.linear import (
    LinearProblem,
    SufficientStatistics,
    finetune_lora,
    lora_ml,
    sample_problem,
    sample_statistics,
    standard,
)


def run_point(point: Point, settings: LinearSettings) -> dict[str, Tensor]:
    """Runs every trial of a point with both methods, all trials at once.

    Both methods get the same problems, data and starts.

    Returns:
        For every method the prediction error on the test task before the first and after every
        step of fine-tuning, [trials, finetune_steps + 1].
    """
    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(threads) as pool:  # each trial has a generator of its own
        drawn = list(pool.map(partial(Trial, point, settings), range(settings.trials)))
    device = torch.device(settings.device)
    retrain_stats = SufficientStatistics.stack([t.retrain_stats for t in drawn]).to(device)
    test_stats = SufficientStatistics.stack([t.test_stats for t in drawn]).to(device)
    weights = {
        "lora-ml": lora_ml(
            retrain_stats,
            point.rank,
            outer_steps=settings.outer_steps,
            inner_steps=settings.inner_steps,
            outer_lr=settings.outer_lr,
            inner_lr=settings.inner_lr,
            initial_factors=torch.stack([t.adapters for t in drawn]).to(device),
        ).weight,
        "standard": standard(
            retrain_stats, steps=settings.outer_steps, lr=settings.outer_lr
        ).weight,
    }
    errors = {}
    for method in METHODS:
        result = finetune_lora(
            test_stats,
            weights[method],
            point.finetune_rank,
            steps=point.finetune_steps,
            lr=settings.finetune_lr,
            initial_factors=(
                torch.stack([t.factor_u for t in drawn]).to(device),
                torch.stack([t.factor_v for t in drawn]).to(device),
            ),
            truth=torch.stack([t.test_truth for t in drawn]).to(device),
        )
        assert result.errors is not None
        errors[method] = result.errors.cpu()
    return errors


def _problem(point: Point, settings: LinearSettings, generator: torch.Generator) -> LinearProblem:
    sizes = point.num_tasks, point.dim, point.rank
    return sample_problem(*sizes, symmetric_base=settings.symmetric_base, generator=generator)


class Trial:
    """Everything that one trial draws at random."""

    def __init__(self, point: Point, settings: LinearSettings, trial: int):
        generator = trial_generator(point, settings.seed, trial)
        problem = _problem(point, settings, generator)
        if settings.one_truth:
            # A problem was drawn from the trial's own generator all the same: otherwise the data of
            # trial 0 would be made from the numbers that its truth is made from.
            problem = _problem(point, settings, trial_generator(point, settings.seed, 0))
        self.test_truth = problem.test_truth
        self.retrain_stats = sample_statistics(
            problem.truths, point.retrain_samples, noise=settings.noise, generator=generator
        )
        self.test_stats = sample_statistics(
            problem.test_truth, point.finetune_samples, noise=settings.noise, generator=generator
        )
        self.adapters = linear_start(generator, point.num_tasks, point.dim, point.rank)
        self.factor_u = linear_start(generator, point.dim, point.finetune_rank)
        self.factor_v = linear_start(generator, point.dim, point.finetune_rank)
