"""Independent implementations of the linear model's training in numpy, and both backends."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from tests.backends import backend  # noqa: F401


@pytest.fixture(scope="session")
def oracle() -> SimpleNamespace:
    """The algorithms as the paper states them: on samples, one at a time, and on sums."""
    return SimpleNamespace(
        lora_ml=_lora_ml,
        lora_ml_by_samples=_lora_ml_by_samples,
        standard_by_samples=_standard_by_samples,
        finetune=_finetune,
        finetune_by_samples=_finetune_by_samples,
    )


def _residual(matrix, x, y):
    """Σ_j (matrix x_j − y_j) x_jᵀ, sample by sample."""
    total = np.zeros_like(matrix)
    for xj, yj in zip(x, y, strict=True):
        total += np.outer(matrix @ xj - yj, xj)
    return total


def _mean_loss(matrices, x, y):
    values = [
        np.mean([np.sum((yj - b @ xj) ** 2) / 2 for xj, yj in zip(xt, yt, strict=True)])
        for b, xt, yt in zip(matrices, x, y, strict=True)
    ]
    return np.mean(values)


def _lora_ml_by_samples(x, y, weight, factors, outer_steps, inner_steps, outer_lr, inner_lr):
    tasks, count = x.shape[:2]
    weight, factors, losses = weight.copy(), factors.copy(), []
    for _ in range(outer_steps):
        for t in range(tasks):
            for _ in range(inner_steps):
                u = factors[t]
                r = _residual(weight + u @ u.T, x[t], y[t])
                factors[t] = u - inner_lr / count * (r + r.T) @ u
        adapted = [weight + u @ u.T for u in factors]
        losses.append(_mean_loss(adapted, x, y))
        total = sum(_residual(b, x[t], y[t]) for t, b in enumerate(adapted))
        weight = weight - outer_lr / (count * tasks) * total
    return weight, factors, np.array(losses)


def _standard_by_samples(x, y, weight, steps, lr):
    tasks, count = x.shape[:2]
    losses = []
    for _ in range(steps):
        losses.append(_mean_loss([weight] * tasks, x, y))
        total = sum(_residual(weight, x[t], y[t]) for t in range(tasks))
        weight = weight - lr / (count * tasks) * total
    return weight, np.array(losses)


def _finetune_by_samples(x, y, weight, u, v, truth, steps, lr, *, sequential=False):
    count = len(x)
    losses, errors = [], []
    for _ in range(steps):
        adapted = weight + u @ v.T
        losses.append(_mean_loss([adapted], [x], [y]))
        errors.append(np.sum((x @ (adapted - truth).T) ** 2))
        r = _residual(adapted, x, y) / count
        new_u = u - lr * r @ v
        v = v - lr * r.T @ (new_u if sequential else u)
        u = new_u
    errors.append(np.sum((x @ (weight + u @ v.T - truth).T) ** 2))
    return u, v, np.array(losses), np.array(errors)


def _lora_ml(gram, cross, count, weight, factors, outer_steps, inner_steps, outer_lr, inner_lr):
    """On sums, for one training: quick enough for runs of the paper's length."""
    tasks = len(gram)
    weight, u = weight.copy(), [f.copy() for f in factors]
    for _ in range(outer_steps):
        total = np.zeros_like(weight)
        for t in range(tasks):
            for _ in range(inner_steps):
                r = (weight + u[t] @ u[t].T) @ gram[t] - cross[t]
                u[t] = u[t] - (inner_lr / count) * ((r + r.T) @ u[t])
            total += (weight + u[t] @ u[t].T) @ gram[t] - cross[t]
        weight = weight - outer_lr / (count * tasks) * total
    return weight, np.stack(u)


def _finetune(gram, cross, count, weight, u, v, steps, lr):
    for _ in range(steps):
        r = ((weight + u @ v.T) @ gram - cross) / count
        u, v = u - lr * r @ v, v - lr * r.T @ u
    return u, v
