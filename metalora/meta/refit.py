"""Fitting the shared head of a retrained model to its shared weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import Unpack

from metalora.adapters import LoRAConfig, adapted_layers
from metalora.adapters.select import select
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds, check_rounds
from metalora.meta.loop import Result
from metalora.meta.methods import train_by_gradient
from metalora.meta.training import Options, check_options


def refit_heads(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str],
    **options: Unpack[Options],
) -> Result:
    """Re-centres a model after retraining: fits its shared head anew, all other weights fixed.

    `lora_ml` and `last_layer_ml` train W together with adapters and heads of the tasks, which they
    then drop or average. The mean of the heads is in general not the best head for W alone. This
    minimises the objective of standard retraining (paper, eq. 1) over the head h alone, without
    adapters and from the present head (running statistics, as of batch normalisation, move on):

        min over h of the mean over samples (x, y) of all tasks of loss(f_{W, h}(x), y).

    Args:
        model: a plain model, trained in place; its parameters require a gradient afterwards if they
            did before.
        rounds: the retraining tasks. In pooled order, or with ``weighting="samples"``, the loss is
            the mean over a batch's samples, otherwise the mean over tasks.
        config: settings.
        heads: names of the layers to fit.
        options: see `Options`.

    Returns:
        A `Result`, whose ``adapters`` are empty.

    Raises:
        ValueError: if ``model`` has adapters or heads of tasks, or has no shared head of that name.
        DivergedError: if the loss is not finite, see `train`.
    """
    check_options("refit_heads", options)
    check_rounds("refit_heads", rounds)
    if adapted_layers(model):
        raise ValueError(
            "refit_heads: the model has adapters or heads of tasks, and no head that they share; "
            "metalora.unload(model) makes it plain"
        )
    if not heads:
        raise ValueError(
            "refit_heads: heads must name the layers to fit, got none; a model without a shared "
            "head cannot be re-centred"
        )
    try:
        chosen = select(model, LoRAConfig(target_modules=(), heads=heads)).heads
    except ValueError as error:
        raise ValueError(f"refit_heads: {str(error).partition(': ')[2]}") from None
    of_heads = {id(p) for layer, _ in chosen for p in layer.parameters()}
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in of_heads)
        return train_by_gradient(model, rounds, config, options)
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
