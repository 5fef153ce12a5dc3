"""All trials of one point of a sweep: problems, retraining with both methods, fine-tuning."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from experiments.lib.machine import one_thread
from experiments.synthetic.linear import layers, native
from experiments.synthetic.linear.draws import Trial
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.settings import METHODS, Point


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
    train = layers if settings.engine == "layers" else native
    weights = {method: train.retrained(method, drawn, settings) for method in METHODS}
    return {
        method: train.errors_of_finetuning(weights[method], drawn, settings) for method in METHODS
    }
