"""Fitting the shared head of a retrained model to its shared weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from metalora.adapters import LoRAConfig, adapted_layers
from metalora.adapters.select import select
from metalora.meta.callbacks import Callback
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds
from metalora.meta.loop import Result, Validation, train
from metalora.meta.steps import Forward, GradientStep, Loss, call_model, cross_entropy


def refit_heads(
    model: nn.Module,
    rounds: Rounds,
    config: TrainConfig,
    heads: Sequence[str] = ("head",),
    *,
    loss: Loss = cross_entropy,
    forward: Forward = call_model,
    validation: Validation | None = None,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Re-centres a model after retraining: fits its shared head anew, all other weights fixed.

    `lora_ml` and `last_layer_ml` train W together with adapters and heads of the tasks, which they
    then drop or average. The mean of the heads is in general not the best head for W alone. This
    minimises the objective of standard retraining (paper, eq. 1) over the head h alone, without
    adapters and from the present head:

        min over h of the mean over samples (x, y) of all tasks of loss(f_{W, h}(x), y).

    Args:
        model: a plain model, trained in place; its parameters require a gradient afterwards if they
            did before.
        rounds: the retraining tasks. Pooled (``RoundLoader(..., order="pooled")``) the loss is the
            mean over samples, otherwise the mean over tasks.
        config: settings.
        heads: names of the layers to fit.
        loss: see `standard`.
        forward: see `standard`.
        validation: see `standard`.
        callbacks: see `standard`.

    Raises:
        ValueError: if ``model`` has adapters or heads of tasks, or has no shared head of that name.
        FloatingPointError: if the loss is not finite.
    """
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
        step = GradientStep(model, rounds, config, loss=loss, forward=forward)
        return train(
            model, rounds, step, config, validation=validation, callbacks=callbacks, forward=forward
        )
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)
