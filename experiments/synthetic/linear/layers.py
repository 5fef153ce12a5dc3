"""Retraining and fine-tuning of all trials by modules and autograd, on the samples themselves.

Shares no code with the native trainers, whose iterates it reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from experiments.synthetic.linear.draws import Trial
from experiments.synthetic.linear.settings import LinearSettings
from metalora._errors import DivergedError
from metalora.linear import prediction_error
from metalora.nn import MultiTaskLoRALinear, SymmetricLoRALinear, TaskBatch


def retrained(method: str, drawn: Sequence[Trial], settings: LinearSettings) -> Tensor:
    """Returns the shared weights that a method leaves, [trials, d, d]."""
    return torch.stack([_retrained(method, trial, settings) for trial in drawn])


def errors_of_finetuning(
    weights: Tensor, drawn: Sequence[Trial], settings: LinearSettings
) -> Tensor:
    """Returns the prediction errors before and after every step, [trials, steps + 1]."""
    pairs = zip(weights, drawn, strict=True)
    return torch.stack([_errors(weight, trial, settings) for weight, trial in pairs]).cpu()


def _retrained(method: str, trial: Trial, settings: LinearSettings) -> Tensor:
    x, y, batch = _samples(trial.retrain_samples, settings)
    tasks, dim = trial.point.num_tasks, trial.point.dim
    layer: nn.Module
    if method == "standard":
        layer = nn.Linear(dim, dim, bias=False, device=x.device, dtype=x.dtype)
        inner, factors = 0, []
    else:
        layer = SymmetricLoRALinear(
            dim, tasks, trial.point.rank, bias=False, device=x.device, dtype=x.dtype
        )
        layer.lora_U.data.copy_(trial.adapters)
        inner, factors = settings.inner_steps, [layer.lora_U]
    weight = layer.weight
    nn.init.zeros_(weight)

    def loss() -> Tensor:
        """Σ_t L_t, of which each U_t has the gradient of its own task's loss."""
        predicted = layer(x, batch) if factors else layer(x)
        return (y - predicted).square().sum() * (tasks / (2 * len(x)))

    for step in range(1, settings.outer_steps + 1):
        for _ in range(inner):
            _descend(loss(), factors, settings.inner_lr)
        _descend(loss() / tasks, [weight], settings.outer_lr)
        if not bool(weight.isfinite().all()):
            raise DivergedError(
                f"layers: retraining diverged, not finite at step {step} of "
                f"{settings.outer_steps}; lower outer_lr or inner_lr"
            )
    return weight.detach()


def _errors(weight: Tensor, trial: Trial, settings: LinearSettings) -> Tensor:
    x, y, batch = _samples(trial.test_samples, settings)
    point = trial.point
    layer = MultiTaskLoRALinear(
        point.dim,
        point.dim,
        1,
        point.finetune_rank,
        bias=False,
        device=x.device,
        dtype=x.dtype,
    )
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.lora_A.copy_(trial.factor_v.mT)
        layer.lora_B.copy_(trial.factor_u)
    layer.weight.requires_grad_(False)
    stats, truth = trial.test_stats.to(x.device), trial.test_truth.to(x.device)

    def error() -> Tensor:
        adapted = layer.weight + layer.lora_B[0] @ layer.lora_A[0]
        return prediction_error(stats, adapted.detach(), truth)

    errors = [error()]
    for _ in range(point.finetune_steps):
        loss = (y - layer(x, batch)).square().sum() / (2 * len(x))
        _descend(loss, [layer.lora_A, layer.lora_B], settings.finetune_lr)
        errors.append(error())
    found = torch.stack(errors)
    if not bool(found.isfinite().all()):
        raise DivergedError("layers: fine-tuning diverged; lower finetune_lr")
    return found


def _samples(
    samples: tuple[Tensor, Tensor] | None, settings: LinearSettings
) -> tuple[Tensor, Tensor, TaskBatch]:
    """x and y [T · N, d], one task behind the other, and their tasks."""
    assert samples is not None
    x, y = (part.to(settings.device) for part in samples)
    tasks, count = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])
    ids = torch.arange(tasks).repeat_interleave(count)
    return x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), TaskBatch(ids, tasks)


def _descend(loss: Tensor, parameters: Sequence[Tensor], rate: float) -> None:
    """Takes one step of gradient descent, on all parameters at once."""
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.sub_(gradient, alpha=rate)
