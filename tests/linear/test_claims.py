"""What the paper says of the linear model, at its own settings (section 3, figure 1)."""

from __future__ import annotations

import pytest
import torch

from metalora._library import native_available
from metalora.linear import (
    finetune_lora,
    lora_ml,
    prediction_error,
    sample_problem,
    sample_statistics,
    standard,
)

pytestmark = pytest.mark.skipif(
    not native_available(), reason="takes minutes without the native library"
)
TRIALS = 5


def errors(tasks: int) -> dict[str, torch.Tensor]:
    """Prediction error per trial after the last step: d = 10, k = 1, N = 5000, n = 100."""
    generator = torch.Generator().manual_seed(2025)
    problem = sample_problem(tasks, 10, 1, batch_shape=(TRIALS,), generator=generator)
    stats = sample_statistics(problem.truths, 5000, generator=generator)
    test_stats = sample_statistics(problem.test_truth, 100, generator=generator)
    weights = {
        "lora-ml": lora_ml(stats, 1, generator=generator).weight,
        "standard": standard(stats).weight,
    }
    final = {}
    for method, weight in weights.items():
        tuned = finetune_lora(
            *(test_stats, weight, 3 if tasks == 2 else 1),
            steps=10000,
            truth=problem.test_truth,
            generator=torch.Generator().manual_seed(1),
        )
        u, v = tuned.factors
        final[method] = prediction_error(test_stats, weight + u @ v.mT, problem.test_truth)
        assert tuned.errors is not None
        torch.testing.assert_close(final[method], tuned.errors[:, -1])
    return final


def test_three_tasks_a_thousand_times_below_standard_retraining() -> None:
    final = errors(tasks=3)
    assert float(final["standard"].mean()) > 1000 * float(final["lora-ml"].mean())


def test_two_tasks_and_rank_3k_both_reach_the_noise_floor() -> None:
    final = errors(tasks=2)
    floor = 0.1**2 * 3 * 10  # σ² r d (paper, lemma 1)
    for method in ("lora-ml", "standard"):
        assert floor / 5 < float(final[method].mean()) < 5 * floor
