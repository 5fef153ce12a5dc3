"""One optimiser step: of gradient training, and of Reptile."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from types import FunctionType
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Unpack

from metalora._checks import SHORT, check_choice, check_count, check_positive, dtype_and_shape
from metalora._errors import DivergedError
from metalora.adapters import adapted_layers, task_parameters
from metalora.meta.config import TrainConfig
from metalora.meta.data import Batch, Rounds, samples_per_task
from metalora.meta.distribution import Distribution
from metalora.meta.identity import identity_of
from metalora.meta.mean import weighted_mean
from metalora.meta.optimizer import NAMED, make_optimizer, warn_of_short
from metalora.meta.seeds import derive_seed
from metalora.meta.task_optimizer import TaskOptimizer
from metalora.nn import sample_dropout, tasks

Loss = Callable[[Any, Batch], Tensor]
"""``loss(outputs, batch)`` → the loss of each sample, [B]."""

Forward = Callable[[nn.Module, Any], Any]
"""``forward(model, batch.inputs)`` → outputs."""


class Calls(TypedDict, total=False):
    """How a training calls the model, and what its outputs cost.

    Attributes:
        loss: ``loss(outputs, batch)`` → the loss of each sample, [B]; without it `cross_entropy`.
        forward: ``forward(model, batch.inputs)`` → outputs; without it `call_model`.
    """

    loss: Loss
    forward: Forward


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    """Each sample's cross-entropy [B] of the logits [B, classes], in fp32 or better.

    Raises:
        TypeError: if the outputs are not a tensor.
        ValueError: if they are not [B, classes], or targets neither class numbers nor
            probabilities.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            "cross_entropy: the model must return logits [B, classes], or have them as .logits or "
            f"['logits'], got {type(outputs).__name__}; pass loss=, a function of (outputs, batch)"
        )
    if outputs.dim() != 2:
        hint = "pass loss=, a function of (outputs, batch) that returns one loss per sample"
        if outputs.dim() == 3:
            hint = (
                "of a causal language model pass forward=causal_lm_losses, loss=mean_token_loss "
                f"(metalora.meta), otherwise {hint}"
            )
        raise ValueError(
            f"cross_entropy: logits must be [B, classes], got {list(outputs.shape)}; {hint}"
        )
    targets = batch.targets
    if targets.is_floating_point() and (targets.shape != outputs.shape or outputs.shape[1] == 1):
        raise ValueError(
            "cross_entropy: targets must be class numbers [B] or probabilities [B, classes], got "
            f"{dtype_and_shape(targets)}; for a regression pass loss=metalora.meta.squared_error"
        )
    numbers = targets.dtype in (torch.int64, torch.uint8) and targets.shape == outputs.shape[:1]
    if not targets.is_floating_point() and not numbers:
        raise ValueError(
            f"cross_entropy: class numbers must be int64 [{len(outputs)}], one for each sample, "
            f"got {dtype_and_shape(targets)}"
        )
    logits = outputs.float() if outputs.dtype in SHORT else outputs
    try:
        return F.cross_entropy(logits, targets, reduction="none")
    except IndexError as error:  # on a CPU; a GPU stops the process
        raise ValueError(
            f"cross_entropy: class numbers must be in [0, {outputs.shape[1]}), as the model has "
            f"{outputs.shape[1]} logits, got {targets.min().item()} to {targets.max().item()}"
        ) from error


def squared_error(outputs: Tensor, batch: Batch) -> Tensor:
    """Each sample's squared error [B], its mean over the outputs, in fp32 or better: a ``loss``.

    Where there is one output for each sample, either of outputs and targets may be [B] and the
    other [B, 1].

    Raises:
        TypeError: if the outputs are not a tensor.
        ValueError: if outputs and targets have not the same shape otherwise.
    """
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"squared_error: the model must return a tensor, got {type(outputs).__name__}"
        )
    targets = batch.targets
    single = {(len(outputs),), (len(outputs), 1)}
    if outputs.shape != targets.shape and not {outputs.shape, targets.shape} <= single:
        raise ValueError(
            f"squared_error: outputs and targets must have the same shape, got "
            f"{list(outputs.shape)} and {list(targets.shape)}"
        )
    exact = outputs.float() if outputs.dtype in SHORT else outputs
    errors = (exact - targets.reshape(outputs.shape).to(exact.dtype)).square()
    return errors if errors.dim() == 1 else errors.flatten(1).mean(1)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """``model(inputs)``, of a mapping ``model(**inputs)``; of outputs with logits these.

    Logits are an attribute of the outputs, or one of the values of a mapping.
    """
    outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    return getattr(outputs, "logits", outputs)


class Objective:
    """The loss of a batch: the mean over its tasks of each task's mean over samples (paper, eq. 5).

    Batches may say otherwise, see `Batch`.

    Args:
        model: plain or adapted.
        config: settings; of them, the precision.
        pooled: take the mean over samples, whatever the batches say.
        distribution: the processes that train together; None means this one.
        loss, forward: see `Calls`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        *,
        pooled: bool = False,
        distribution: Distribution | None = None,
        loss: Loss = cross_entropy,
        forward: Forward = call_model,
    ) -> None:
        self.model, self.config, self.pooled = model, config, pooled
        self.distribution = Distribution(None, ()) if distribution is None else distribution
        self.loss, self.forward = _checked_loss(loss), forward
        first = next(model.parameters())
        self.device = first.device
        self._dtype_of_losses = torch.float32 if first.dtype in SHORT else first.dtype
        self._dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.precision)

    def backward(
        self,
        batch: Batch,
        scaler: torch.amp.GradScaler,
        only: Sequence[Tensor] | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Adds the gradients of this process's part of a batch, times the scaler's scale.

        Args:
            batch: the whole batch.
            scaler: scales the gradients.
            only: parameters that alone get gradients.
            seed: of the dropout masks, where they are those of each sample by itself.

        Returns:
            The loss of the part, whose weights in the whole batch add up to at most 1.
        """
        if self.pooled:
            batch = replace(batch, weighting="samples")
        batch = replace(batch, weights=batch.loss_weights())
        part = self.distribution.part(batch)
        if len(part.task_ids) == 0:
            return scaler.scale(self.no_loss())
        values = [self._pass_backward(p, scaler, only, seed) for p in part.passes()]
        value = values[0] if len(values) == 1 else torch.stack(values).sum()
        return value if self.distribution.parallel is None else value.to(self._dtype_of_losses)

    def _pass_backward(
        self,
        batch: Batch,
        scaler: torch.amp.GradScaler,
        only: Sequence[Tensor] | None,
        seed: int | None,
    ) -> Tensor:
        if batch.weights is None:
            raise ValueError(
                "collate: must give its batches the samples' weights, as Batch.take does, got None"
            )
        context = tasks(batch.task_ids, counts=batch.counts, lengths=batch.lengths)
        autocast = torch.autocast(self.device.type, self._dtype, enabled=self._dtype is not None)
        with context, _own_masks(batch, seed):
            with autocast:
                losses = self.loss(self.forward(self.model, batch.inputs), batch)
            if not isinstance(losses, Tensor) or losses.shape != batch.task_ids.shape:
                got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
                raise ValueError(
                    f"loss: must return one loss per sample, [{len(batch.task_ids)}], got {got}"
                )
            value = weighted_mean(losses, batch.weights)
            # peft switches off the gradients of adapters that are not in use.
            inputs = None if only is None else [p for p in only if p.requires_grad]
            # In the context: checkpointed layers run again.
            scaler.scale(value).backward(inputs=inputs)
        return value.detach()

    def no_loss(self) -> Tensor:
        """The loss of no samples: 0, of the dtype that losses have."""
        return torch.zeros((), dtype=self._dtype_of_losses, device=self.device)


def _checked_loss(loss: Any) -> Loss:
    """A function of (outputs, batch), which none of torch's own losses is."""
    inner = getattr(loss, "func", loss)  # of functools.partial
    function = isinstance(inner, FunctionType)
    module = inner.__module__ if function else type(inner).__module__
    if callable(loss) and module not in ("torch.nn.functional", "torch.nn.modules.loss"):
        return loss
    got = inner.__name__ if function else type(inner).__name__
    raise TypeError(
        f"loss: must be a function of (outputs, batch) that returns one loss per sample, [B], got "
        f"{got}; for instance loss=lambda outputs, batch: torch.nn.functional.cross_entropy("
        "outputs, batch.targets, reduction='none')"
    )


@contextmanager
def _own_masks(batch: Batch, seed: int | None) -> Iterator[None]:
    """Within, dropout follows from the seed and each sample's place; without a seed as ever."""
    if seed is None:
        yield
        return
    torch.manual_seed(seed)
    if batch.places is None:  # a collate that does not pass them on
        yield
        return
    with sample_dropout(batch.places, batch.lengths):
        yield


class Step(ABC):
    """How a training takes its steps, and on which parameters.

    Args:
        model: its trainable parameters are trained.
        rounds: the loader.
        config: settings.
        pooled: whether the loss is the mean over samples, see `Objective`.
        settings: what else it is made with, as JSON can hold it: a checkpoint's must agree.
        own: what the tasks have of their own; None means the adapters and heads that
            `metalora.adapt` puts in.
        calls: see `Calls`.
    """

    optimizer: torch.optim.Optimizer
    number: int = 0
    """Index of the next step, from 0."""

    def __init__(
        self,
        model: nn.Module,
        rounds: Rounds,
        config: TrainConfig,
        *,
        pooled: bool,
        settings: Mapping[str, Any],
        own: Sequence[nn.Parameter] | None = None,
        **calls: Unpack[Calls],
    ) -> None:
        self.model, self.config = model, config
        self.distribution = distribution_of(config, rounds)
        self.distribution.check_model(model)
        self.objective = Objective(
            model, config, pooled=pooled, distribution=self.distribution, **calls
        )
        self.settings: dict[str, Any] = {
            "num_tasks": rounds.num_tasks,
            **settings,
            "loss": identity_of(self.objective.loss),
            "forward": identity_of(self.objective.forward),
        }
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        of_tasks = {id(p) for p in (task_parameters(model) if own is None else own)}
        self.own = [p for p in self.parameters if id(p) in of_tasks]
        self.shared = [p for p in self.parameters if id(p) not in of_tasks]
        if not self.parameters:
            raise ValueError("train: the model has no trainable parameters")
        # Only fp16 needs gradients scaled; for other precisions the scaler does nothing.
        device = self.objective.device.type
        self.scaler = torch.amp.GradScaler(device, enabled=config.precision == "fp16")

    @abstractmethod
    def per_epoch(self, rounds: Rounds) -> int:
        """How many steps an epoch has."""

    @abstractmethod
    def split(self, rounds: Rounds) -> Iterator[list[Batch]]:
        """Cuts an epoch into what each step needs."""

    @abstractmethod
    def __call__(self, batches: list[Batch]) -> Tensor:
        """Takes one step; returns its loss, a scalar without graph that the host need not have."""

    def descend(
        self,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        only: Sequence[nn.Parameter] | None = None,
        *,
        place: tuple[int, ...] = (),
        alone: bool = False,
    ) -> Tensor:
        """Steps ``optimizer`` on the loss of ``batch``; returns the loss before it.

        Args:
            optimizer: what steps.
            batch: the whole batch.
            only: parameters that alone get gradients, clipped to ``config.grad_clip``; the
                optimiser leaves the others as they are.
            place: tells this descent from others of the same step, for the dropout masks.
            alone: whether the batch is all of this process, so that nothing is exchanged, and the
                loss not checked, which would end this process alone.

        Raises:
            DivergedError: if the loss is NaN or infinite, in all processes; known here on a CPU
                alone.
        """
        optimizer.zero_grad()
        if isinstance(optimizer, TaskOptimizer):
            optimizer.forget_passes()  # a validation's or a callback's
        distribution, seed = self.distribution, None
        if distribution.parallel is not None:
            seed = derive_seed("dropout", self.config.seed, self.number, *place)
        value = self.objective.backward(batch, self.scaler, only, seed)
        if not alone:
            exchanged = self.shared if distribution.by_task else self.parameters
            if only is not None:
                chosen = {id(p) for p in only}
                exchanged = [p for p in exchanged if id(p) in chosen]
            value = distribution.sum_gradients(exchanged, value)
            # None of Reptile's tasks, nor the first of several steps, has changed a weight before.
            first = self.number == 0 and not any(place[-1:])
            self._check_finite(value, first=first and only is not self.shared)
        if self.config.grad_clip is not None:
            self.scaler.unscale_(optimizer)
            if alone:
                nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
            else:
                distribution.clip_gradients(self.shared, self.own, self.config.grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()
        return value

    def _check_finite(self, loss: Tensor, first: bool = False) -> None:
        if loss.device.type == "cpu":  # reading it waits for nothing
            what = "the loss of the first step" if first else "the loss of a step"
            check_finite(float(loss), what, self.config, first=first)


class GradientStep(Step):
    """One step of the optimiser on the loss of a round, or of one task's part of it.

    With ``config.adapter_steps`` above 1, that many steps on the adapters and heads, then one on
    the shared weights; the loss is that before the latter.

    The adapters of tasks that are absent stay as they are, see `metalora.TaskOptimizer`.

    Args:
        model: plain or adapted; its trainable parameters are trained.
        rounds: the loader.
        config: settings.
        own: see `Step`.
        calls: see `Calls`.
    """

    def __init__(
        self,
        model: nn.Module,
        rounds: Rounds,
        config: TrainConfig,
        *,
        own: Sequence[nn.Parameter] | None = None,
        **calls: Unpack[Calls],
    ) -> None:
        if rounds.pooled and config.step_per == "task":
            raise ValueError("train: pooled rounds ignore tasks; use step_per='round' with them")
        settings = {"pooled": rounds.pooled}
        super().__init__(
            model, rounds, config, pooled=rounds.pooled, settings=settings, own=own, **calls
        )
        if config.adapter_steps > 1 and not (self.own and self.shared):
            lacking = "weights that the tasks share" if self.own else "adapters or heads of tasks"
            raise ValueError(
                f"train: adapter_steps must be 1 where no {lacking} are trained, "
                f"got {config.adapter_steps}"
            )
        self.optimizer = self._make_optimizer()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        apart = {"lr": config.adapter_lr, "weight_decay": config.adapter_weight_decay}
        if adapted_layers(self.model):
            optimizer = TaskOptimizer(
                self.model,
                NAMED[config.optimizer],
                lr=config.lr,
                weight_decay=config.weight_decay,
                task_parallel=self.distribution.by_task,
                **config.optimizer_settings,
                **{f"adapter_{name}": value for name, value in apart.items()},
            )
            optimizer.exchanges = self.distribution.parallel == "data"
            return optimizer
        warn_of_short("train", self.parameters)
        # Adapters of peft are parameters of one task each, without a gradient where it is absent.
        given = {name: value for name, value in apart.items() if value is not None}
        groups: list[dict[str, Any]] = [{"params": self.shared}, {"params": self.own, **given}]
        return make_optimizer(
            config.optimizer,
            [g for g in groups if g["params"]],
            config.lr,
            config.weight_decay,
            **config.optimizer_settings,
        )

    def per_epoch(self, rounds: Rounds) -> int:
        """How many steps an epoch has; with "proportional" rounds, one task per step, at most."""
        return sum(rounds.rounds_per_task) if self.config.step_per == "task" else len(rounds)

    def split(self, rounds: Rounds) -> Iterator[list[Batch]]:
        """A round per step, or a round's tasks one after the other."""
        for batch in rounds:
            if self.config.step_per == "task":
                yield from ([part] for part in batch.by_task())
            else:
                yield [batch]

    def __call__(self, batches: list[Batch]) -> Tensor:
        """Takes one step on the one batch; returns its loss."""
        (batch,) = batches
        if self.config.adapter_steps == 1:
            return self.descend(self.optimizer, batch)
        for i in range(self.config.adapter_steps):
            self.descend(self.optimizer, batch, self.own, place=(i,))
        return self.descend(self.optimizer, batch, self.shared)


class ReptileStep(Step):
    """Reptile: per task, some optimiser steps from W; then W moves along W_inner − W.

    W − W_inner is handed to the outer optimiser as the gradient, so it steps towards the task's
    solution; ``outer_sign="away"`` hands it the opposite. Inner optimisers start anew each time.
    Buffers, such as the running statistics of batch normalisation, are not reset between tasks.

    Args:
        model: plain; its trainable parameters are trained.
        rounds: the loader.
        config: settings of the outer optimiser; its ``step_per`` is not used, its ``grad_clip``
            and ``precision`` hold for the inner steps.
        inner_steps, inner_lr, inner_optimizer, outer_sign, average: see `reptile`.
        calls: see `Calls`.
    """

    def __init__(
        self,
        model: nn.Module,
        rounds: Rounds,
        config: TrainConfig,
        *,
        inner_steps: int = 20,
        inner_lr: float = 1e-2,
        inner_optimizer: str = "sgd",
        outer_sign: str = "towards",
        average: bool = False,
        **calls: Unpack[Calls],
    ) -> None:
        if rounds.pooled:
            raise ValueError(
                "reptile: pooled rounds ignore tasks; use a loader with order='rounds'"
            )
        several = sum(count > 0 for count in rounds.rounds_per_task) > 1
        if several and sum(rounds.rounds_per_task) == len(rounds):
            raise ValueError(
                "reptile: takes inner_steps rounds of all tasks at a time, got batches of single "
                "tasks; use a loader with order='rounds'"
            )
        if config.adapter_steps > 1:
            raise ValueError(
                f"reptile: adapter_steps must be 1, as there are no adapters, "
                f"got {config.adapter_steps}"
            )
        settings: dict[str, Any] = {
            "inner_steps": check_count("reptile", "inner_steps", inner_steps),
            "inner_lr": check_positive("reptile", "inner_lr", inner_lr),
            "inner_optimizer": check_choice("reptile", "inner_optimizer", inner_optimizer, NAMED),
            "outer_sign": check_choice("reptile", "outer_sign", outer_sign, ("towards", "away")),
            "average": average,
        }
        super().__init__(model, rounds, config, pooled=False, settings=settings, **calls)
        self.inner_steps, self.inner_lr = settings["inner_steps"], settings["inner_lr"]
        self.average = average
        self.inner_optimizer = inner_optimizer
        self.sign = 1.0 if outer_sign == "towards" else -1.0
        warn_of_short("reptile", self.parameters)
        self.optimizer = make_optimizer(
            config.optimizer,
            self.parameters,
            config.lr,
            config.weight_decay,
            **config.optimizer_settings,
        )

    def per_epoch(self, rounds: Rounds) -> int:
        """How many outer steps an epoch has; at most, where the order is another than "rounds"."""
        groups = -(-len(rounds) // self.inner_steps)
        if self.average:
            return groups
        if getattr(rounds, "order", "") == "rounds":  # a task's are the first ones
            return sum(-(-count // self.inner_steps) for count in rounds.rounds_per_task)
        return sum(min(count, groups) for count in rounds.rounds_per_task)

    def split(self, rounds: Rounds) -> Iterator[list[Batch]]:
        """``inner_steps`` rounds at a time, task by task or together."""
        source = iter(rounds)
        while group := [batch.by_task() for batch in islice(source, self.inner_steps)]:
            parts = [part for batch in group for part in batch]
            if self.average:
                yield parts
            else:
                yield from group_by_task(parts)

    def __call__(self, batches: list[Batch]) -> Tensor:
        """Takes one outer step; returns the mean loss of its inner steps."""
        start = [p.detach().clone() for p in self.parameters]
        try:
            gradients, loss = self._outer_gradients(start, group_by_task(batches))
        except BaseException:
            with torch.no_grad():
                for p, before in zip(self.parameters, start, strict=True):
                    p.copy_(before)
            raise
        for p, gradient in zip(self.parameters, gradients, strict=True):
            p.grad = gradient
        if self.distribution.by_task:
            loss = self.distribution.sum_gradients(self.parameters, loss)
            self._check_finite(loss)
        self.optimizer.step()
        return loss

    def _outer_gradients(
        self, start: list[Tensor], per_task: list[list[Batch]]
    ) -> tuple[list[Tensor], Tensor]:
        """W − W_inner, averaged over tasks, and the mean loss of the inner steps.

        Task parallel, each task is stepped by its own process, which gives the part of the others 0
        in both.
        """
        distribution = self.distribution
        gradients = [torch.zeros_like(p) for p in start]
        losses = []
        for of_task in per_task:
            (task,) = of_task[0].tasks_present()
            if distribution.by_task and task not in distribution.tasks:
                continue
            inner = make_optimizer(self.inner_optimizer, self.parameters, self.inner_lr, 0.0)
            losses += [
                self.descend(inner, batch, place=(task, i), alone=distribution.by_task)
                for i, batch in enumerate(of_task)
            ]
            with torch.no_grad():
                for p, before, gradient in zip(self.parameters, start, gradients, strict=True):
                    gradient.add_(before - p, alpha=self.sign / len(per_task))
                    p.copy_(before)
        if not distribution.by_task:
            return gradients, torch.stack(losses).mean()
        losses = losses or [self.objective.no_loss()]
        return gradients, torch.stack(losses).sum() / sum(map(len, per_task))


def distribution_of(config: TrainConfig, rounds: Rounds) -> Distribution:
    """How the processes share a training with these settings and data."""
    return Distribution(config.parallel, samples_per_task(rounds))


def check_finite(loss: float, what: str, config: TrainConfig, *, first: bool = False) -> None:
    """Raises DivergedError if ``loss`` is NaN or infinite; ``first``: before any weight changed."""
    if math.isfinite(loss):
        return
    if first:
        advice = "look for NaN and infinity in inputs, targets and initial weights"
    else:
        clip = " or clip gradients with grad_clip" if config.grad_clip is None else ""
        advice = f"lower lr={config.lr:g}{clip}, if inputs and targets are finite"
    raise DivergedError(f"train: {what} is {loss}; {advice}")


def group_by_task(batches: list[Batch]) -> list[list[Batch]]:
    """Batches of one task each → per task its batches, in their order."""
    groups: dict[int, list[Batch]] = {}
    for batch in batches:
        groups.setdefault(batch.tasks_present()[0], []).append(batch)
    return [groups[task] for task in sorted(groups)]
