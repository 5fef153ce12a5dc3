"""What a trial draws at random: its problem, data and starts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from experiments.synthetic.data import linear_samples, linear_start, trial_generator
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.settings import Point
from metalora.linear import (
    LinearProblem,
    SufficientStatistics,
    sample_problem,
    sample_statistics,
    sufficient_statistics,
)


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
        self.point, self.test_truth = point, problem.test_truth
        draw = partial(self._draw, settings, generator)
        self.retrain_stats, self.retrain_samples = draw(problem.truths, point.retrain_samples)
        self.test_stats, self.test_samples = draw(problem.test_truth, point.finetune_samples)
        self.adapters = linear_start(generator, point.num_tasks, point.dim, point.rank)
        self.factor_u = linear_start(generator, point.dim, point.finetune_rank)
        self.factor_v = linear_start(generator, point.dim, point.finetune_rank)

    @staticmethod
    def _draw(
        settings: LinearSettings, generator: torch.Generator, truth: Tensor, count: int
    ) -> tuple[SufficientStatistics, tuple[Tensor, Tensor] | None]:
        """Draws samples; returns their statistics, and themselves where they are trained on."""
        if settings.engine == "native":
            drawn = sample_statistics(truth, count, noise=settings.noise, generator=generator)
            return drawn, None
        x, y = linear_samples(truth, count, settings.noise, generator)
        return sufficient_statistics(x, y), (x, y)
