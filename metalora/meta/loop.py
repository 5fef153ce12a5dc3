"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import check_count, first_of, short
from metalora._warn import warn_user
from metalora.adapters import adapted_layers
from metalora.meta.compiling import compiled
from metalora.meta.config import TrainConfig
from metalora.meta.data import Rounds, check_rounds
from metalora.meta.evaluation import Evaluation, evaluate, evaluation_mode
from metalora.meta.precision import matmul_precision
from metalora.meta.schedule import schedule_factor
from metalora.meta.seeds import derive_seed, own_random_state, restore_random_state
from metalora.meta.steps import ReptileStep, Step, check_finite
from metalora.meta.task_optimizer import TaskOptimizer
from metalora.meta.training import Callback, Training, Validation, rank_of

ENOUGH_STEPS, FEW_STEPS = 8, 3
"""In fewer steps an adapter may be absent by chance, as those of experts and dropped layers are; at
the end of a training there are no more to come."""


@dataclass(frozen=True)
class Result:
    """What a training did.

    Attributes:
        history: per epoch: epoch, loss (mean over its steps), lr (of its last step) and, with a
            validation, validation (the higher the better) and validation_per_task where it was
            measured.
        kept_epoch: the epoch whose weights the model has now.
        best_epoch: the epoch with the highest validation that was measured, where NaN is worse than
            any number; the last, without one.
        best_metric: the validation there; None without one. A maximum over epochs of held-out
            data is optimistic: report ``last_metric`` beside it.
        last_metric: the validation of the last epoch; None without one, or if a callback ended the
            training after an epoch that was not measured.
        adapters: per task what `metalora.task_state_dict` gave at the end; of a task that another
            process holds (``parallel="tasks"``), nothing.
    """

    history: list[dict[str, Any]]
    kept_epoch: int
    best_epoch: int
    best_metric: float | None
    last_metric: float | None
    adapters: list[dict[str, Tensor]] = field(default_factory=list)


@own_random_state()
def train(
    model: nn.Module,
    rounds: Rounds,
    step: Step,
    config: TrainConfig,
    *,
    validation: Validation | None = None,
    validate_every: int = 1,
    callbacks: Iterable[Callback] = (),
) -> Result:
    """Trains ``model`` in place.

    Every epoch seeds torch's generator from (seed, epoch), so it does not depend on what came
    before, and `Checkpoint` can resume between any two. Afterwards the generator is as the caller
    left it. All threads share it: trainings that run at the same time and draw from it, as dropout
    does, do not repeat bit for bit. No gradients are left on the model, also after an error.

    Args:
        model: plain or adapted.
        rounds: the data.
        step: how a step is taken, and on which parameters.
        config: settings.
        validation, validate_every, callbacks: see `Watch`; a validation loader is run with the
            step's ``forward``.

    Returns:
        A `Result`, whose ``adapters`` are empty: the model has them still.

    Raises:
        TypeError: if ``validation`` is neither a loader for tasks nor a function, or ``callbacks``
            are not some of `Callback`.
        DivergedError: if the loss is NaN or infinite. On a CPU this is found before the step is
            taken, so the weights are those of the last good step. On a GPU it is found only at the
            end of the epoch, where the host waits anyway; the weights may be NaN by then.
        RuntimeError, ValueError: if ``config.compile`` is set and nothing can be compiled here, or
            ``model`` is wrapped by ``torch.compile``.
        ProcessGroupError: if processes that train together differ, or one ends or does not answer.
    """
    validate_every = check_count("train", "validate_every", validate_every)
    per_epoch = step.per_epoch(rounds)
    callbacks = _checked_callbacks(callbacks)
    if validation is not None and not callable(validation):
        check_rounds("train", validation, "validation")
    training = Training(
        model, rounds, step, config, validation, callbacks, per_epoch, validate_every
    )
    compiling = compiled(model) if config.compile else nullcontext()
    precision, processes = matmul_precision(config.matmul_precision), step.distribution
    with precision, compiling, processes.active():
        if processes.world_size > 1:
            training.identity()  # compares the processes
        with ExitStack() as stops:
            stops.callback(step.optimizer.zero_grad)  # the last step's are not the caller's
            for callback in training.callbacks:
                stops.callback(callback.on_stop, training)
                callback.on_start(training)
            _train(training)
    return _result(training)


def _checked_callbacks(callbacks: Iterable[Callback]) -> list[Callback]:
    if not isinstance(callbacks, Iterable):
        got = type(callbacks).__name__
        raise TypeError(
            f"train: callbacks must be a list of metalora.meta.Callback, got {got}; put it in a "
            f"list, callbacks=[{got}()]"
        )
    found = list(callbacks)
    for callback in found:
        if isinstance(callback, type) or not hasattr(callback, "on_epoch"):
            raise TypeError(
                "train: each of callbacks must be an object with the methods of "
                f"metalora.meta.Callback, got {short(callback)}"
            )
    return found


def _train(training: Training) -> None:
    model, rounds, step = training.model, training.rounds, training.step
    config, callbacks = training.config, training.callbacks
    warned = False
    for epoch in range(training.next_epoch, config.epochs):
        (stopping,) = training.distribution.broadcast([training.stopping], training.device)
        training.stopping = bool(stopping)
        if training.stopping and training.history and not training.steps_in_epoch:
            break
        torch.manual_seed(derive_seed("epoch", config.seed, epoch))
        rounds.set_epoch(epoch)
        model.train()
        left = step.split(rounds)
        if training.steps_in_epoch:  # resumed within this epoch
            for _ in range(training.steps_in_epoch):
                next(left)
            restore_random_state(training.random_state)
        for batches in left:
            when = epoch, training.steps_done, training.steps_per_epoch
            factor = schedule_factor(config, *when)
            for group in step.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * factor
            step.number = training.steps_done
            training.losses.append(step(batches))
            training.steps_done += 1
            training.steps_in_epoch += 1
            for callback in callbacks:
                callback.on_step(training, training.losses[-1])

        if not training.losses:
            raise ValueError(
                f"train: the loader gave no batch in epoch {epoch}; it must give its batches anew "
                "in every iteration"
            )
        factor = schedule_factor(config, epoch, training.steps_done - 1, training.steps_per_epoch)
        # The epoch's only wait for the device.
        loss = float(torch.stack(training.losses).mean())
        first = _began_so(training, loss)
        check_finite(loss, f"the mean loss of epoch {epoch}", config, first=first)
        warned = warned or _warn_of_unreached(training, ENOUGH_STEPS)
        lr = config.lr * factor
        record = {"epoch": epoch, "loss": loss, "lr": lr, **_validate(training, epoch)}
        training.history.append(record)
        training.next_epoch, training.kept_epoch = epoch + 1, epoch
        training.steps_in_epoch, training.losses = 0, []
        for callback in callbacks:
            callback.on_epoch(training, record)

    if not warned:
        _warn_of_unreached(training, FEW_STEPS)
    for callback in callbacks:
        callback.on_end(training)


def _warn_of_unreached(training: Training, least: int) -> bool:
    """Warns of adapters and heads that no step has reached; False if it is too early to tell."""
    optimizer = training.step.optimizer
    if not isinstance(optimizer, TaskOptimizer) or training.distribution.by_task:
        return True
    if optimizer.steps < least:
        return False
    unreached = {id(p) for p in optimizer.unreached}
    names = [
        name
        for name, layer in adapted_layers(training.model).items()
        if any(id(p) in unreached for p in layer.own_task_parameters().values())
    ]
    if names and training.distribution.rank == 0:
        shown = first_of([repr(name) for name in names], 5)
        warn_user(
            f"train: no gradient has reached the adapters of {shown} in {optimizer.steps} steps: "
            "the model does not call these layers (it may read their weights instead), or the loss "
            "does not depend on them; leave them out by exclude_modules or target_modules"
        )
    return True


def _began_so(training: Training, mean: float) -> bool:
    """Whether the mean loss of an epoch is not finite as the very first loss was not."""
    if math.isfinite(mean) or training.steps_done > len(training.losses):
        return False
    one_step = not isinstance(training.step, ReptileStep) and training.config.adapter_steps == 1
    return one_step and not bool(training.losses[0].isfinite())


def _validate(training: Training, epoch: int) -> dict[str, Any]:
    model, validation = training.model, training.validation
    if validation is None or not training.validates(epoch):
        return {}
    if callable(validation):
        with evaluation_mode(model), torch.enable_grad():  # it may fine-tune a copy
            measured = validation(model)
        if not isinstance(measured, Evaluation) and not hasattr(measured, "__float__"):
            raise TypeError(
                "train: validation must return a number, the higher the better, or what "
                f"metalora.meta.evaluate returns, got {type(measured).__name__}"
            )
        found = _agreed(training, measured)
    else:
        found = evaluate(model, validation, forward=training.step.objective.forward)
    if isinstance(found, Evaluation):
        return {"validation": found.mean, "validation_per_task": list(found.per_task)}
    return {"validation": float(found)}


def _agreed(training: Training, found: Evaluation | float) -> Evaluation | float:
    """What process 0 found, so that all processes decide alike."""
    every = (found.mean, *found.per_task) if isinstance(found, Evaluation) else (float(found),)
    mean, *per_task = training.distribution.broadcast(every, training.device)
    return Evaluation(tuple(per_task), mean) if isinstance(found, Evaluation) else mean


def _result(training: Training) -> Result:
    history: Sequence[dict[str, Any]] = training.history
    validated = [record for record in history if "validation" in record] or history[-1:]
    best = max(validated, key=lambda record: rank_of(record.get("validation", 0.0)))
    return Result(
        history=training.history,
        kept_epoch=training.kept_epoch,
        best_epoch=best["epoch"],
        best_metric=best.get("validation"),
        last_metric=history[-1].get("validation"),
    )
