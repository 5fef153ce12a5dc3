"""Trials of one point of the shallow network's sweeps: problems, retraining, fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from experiments.lib.machine import one_thread
from experiments.synthetic.data import trial_generator
from experiments.synthetic.settings import METHODS, Point
from experiments.synthetic.shallow.settings import ShallowSettings
from metalora.shallow import (
    AdamW,
    Adapters,
    Network,
    finetune_lora,
    initial_adapters,
    initial_network,
    lora_ml,
    sample_data,
    sample_problem,
    standard,
)

HELD_OUT = 10000  # fresh inputs of the test task


def run_trials(
    point: Point, settings: ShallowSettings, trials: Sequence[int]
) -> dict[str, dict[str, Tensor]]:
    """Runs these trials of a point with both methods, side by side.

    Both methods get the same problems, data and starts.

    Returns:
        For every method, a value for each trial of: ``prediction_error``, the mean squared error
        against the noiseless outputs of the test task on its n inputs after the last epoch;
        ``held_out_error``, the same on fresh inputs; the losses before the last step of retraining
        and of fine-tuning.
    """
    with one_thread():
        drawn = [_draw(point, settings, trial) for trial in trials]
    start = Network(_stack(drawn, "weight"), _stack(drawn, "output"))
    data = _stack(drawn, "x"), _stack(drawn, "y")
    adapters = Adapters(_stack(drawn, "lora_A"), _stack(drawn, "lora_B"))
    few = _stack(drawn, "few_x"), _stack(drawn, "few_y")
    fresh = Adapters(_stack(drawn, "fresh_A"), _stack(drawn, "fresh_B"))
    adamw = AdamW(lr=settings.lr, weight_decay=settings.weight_decay)
    epochs = settings.retrain_epochs
    results = {}
    for method in METHODS:
        if method == "lora-ml":
            trained = lora_ml(*data, start, adapters, epochs=epochs, optimizer=adamw)
        else:
            trained = standard(*data, start, epochs=epochs, optimizer=adamw)
        tuned = finetune_lora(
            *few, trained.network, fresh, epochs=settings.finetune_epochs, optimizer=adamw
        )
        network = trained.network.adapted(tuned.adapters)
        results[method] = {
            "prediction_error": _error(network, few[0], _stack(drawn, "few_clean")),
            "held_out_error": _error(network, _stack(drawn, "other_x"), _stack(drawn, "other_y")),
            "retrain_loss": trained.losses[:, -1],
            "finetune_loss": tuned.losses[:, -1],
        }
    return results


def _draw(point: Point, settings: ShallowSettings, trial: int) -> dict[str, Tensor]:
    """Draws everything random of one trial."""
    generator = trial_generator(point, settings.seed, trial)
    common: dict[str, Any] = {"generator": generator, "dtype": getattr(torch, settings.dtype)}
    problem = sample_problem(point.num_tasks, point.dim, point.rank, **common)
    test = problem.test_network
    noise: dict[str, Any] = {"noise": settings.noise, "generator": generator}
    x, y = sample_data(problem.networks, point.retrain_samples, **noise)
    few_x, few_y = sample_data(test, point.finetune_samples, **noise)
    other_x, other_y = sample_data(test, HELD_OUT, noise=0, generator=generator)
    start = initial_network(point.dim, init=settings.init, **common)
    adapters = initial_adapters(point.rank, point.dim, batch_shape=(point.num_tasks,), **common)
    fresh = initial_adapters(point.finetune_rank, point.dim, **common)
    return {
        "x": x,
        "y": y,
        "few_x": few_x,
        "few_y": few_y,
        "few_clean": test.predict(few_x),
        "other_x": other_x,
        "other_y": other_y,
        "weight": start.weight,
        "output": start.output,
        "lora_A": adapters.lora_A,
        "lora_B": adapters.lora_B,
        "fresh_A": fresh.lora_A,
        "fresh_B": fresh.lora_B,
    }


def _stack(drawn: Sequence[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([one[name] for one in drawn])


def _error(network: Network, x: Tensor, clean: Tensor) -> Tensor:
    return (network.predict(x) - clean).square().mean(-1)
