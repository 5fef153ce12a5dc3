"""Baselines of recommender systems: biases of users and items, and matrix factorisation.

Both predict the rating of item i by user u as

    r_ui = mu + b_u + b_i + p_u · q_i,

biases alone with no factors p_u, q_i. They minimise, by alternating least squares,

    Σ (r_ui - mu - b_u - b_i - p_u · q_i)² + bias_decay (Σ b_u² + Σ b_i²) + decay (Σ |p_u|² + Σ |q_i|²)

over the retraining users' ratings. An unseen user is folded in: with the items' b_i and q_i fixed,
b_u and p_u are a ridge regression on the user's own ratings, with a closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from experiments.ratings.data import Part

STEPS = 15  # of users and items in turn; more change the RMSE of unseen users by less than 1e-3


@dataclass(frozen=True)
class Factors:
    """What is known of the items.

    Attributes:
        mean: of all ratings.
        biases: [I], b_i.
        factors: [I, k], q_i; k may be 0.
    """

    mean: float
    biases: np.ndarray
    factors: np.ndarray

    def fold_in(self, shots: Part, bias_decay: float, decay: float) -> np.ndarray:
        """Returns each task's (b_u, p_u), [T, 1 + k], of its own ratings."""
        items, values = shots.items.numpy(), shots.values.numpy().astype(np.float64)
        targets = values - self.mean - self.biases[items]
        features = _with_ones(self.factors)
        return _ridge(features[items], targets, shots.tasks.numpy(), bias_decay, decay)

    def predict(self, users: np.ndarray, part: Part) -> np.ndarray:
        """Returns the predictions [N] of a part's ratings, with (b_u, p_u) of each task."""
        items, tasks = part.items.numpy(), part.tasks.numpy()
        own = (_with_ones(self.factors)[items] * users[tasks]).sum(1)
        return self.mean + self.biases[items] + own


def factorize(
    part: Part, num_items: int, rank: int, bias_decay: float, decay: float, seed: int
) -> Factors:
    """Fits the items' biases and factors to ratings, with ``rank`` factors; 0 is biases alone."""
    users, items = part.tasks.numpy(), part.items.numpy()
    values = part.values.numpy().astype(np.float64)
    mean = float(values.mean())
    start = np.random.default_rng(seed).normal(0, 0.1, (num_items, rank))
    of_items = np.concatenate([np.zeros((num_items, 1)), start], axis=1)  # (b_i, q_i)
    for _ in range(STEPS):
        targets = values - mean - of_items[items, 0]
        features = _with_ones(of_items[:, 1:])[items]
        of_users = _ridge(features, targets, users, bias_decay, decay)  # (b_u, p_u)
        targets = values - mean - of_users[users, 0]
        features = _with_ones(of_users[:, 1:])[users]
        of_items = _ridge(features, targets, items, bias_decay, decay, num_items)
    return Factors(mean, of_items[:, 0], of_items[:, 1:])


def _with_ones(factors: np.ndarray) -> np.ndarray:
    """[n, k] → [n, 1 + k], with a first column of ones."""
    return np.concatenate([np.ones((len(factors), 1)), factors], axis=1)


def _ridge(
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    bias_decay: float,
    decay: float,
    count: int = 0,
) -> np.ndarray:
    """Solves a ridge regression for each group of rows.

    Args:
        features: [N, 1 + k], the first for the bias.
        targets: [N].
        groups: int [N].
        bias_decay, decay: of the first coefficient, and of each other.
        count: number of groups G, if more than the largest of ``groups``.

    Returns:
        The coefficients [G, 1 + k]; 0 for a group without rows.
    """
    order = np.argsort(groups, kind="stable")
    features, targets, sizes = features[order], targets[order], np.bincount(groups, minlength=count)
    width = features.shape[1]
    ends = sizes.cumsum()
    solved = np.zeros((len(sizes), width))
    penalty = np.diag([bias_decay] + [decay] * (width - 1))
    for group in sizes.nonzero()[0]:
        rows = slice(ends[group] - sizes[group], ends[group])
        x, y = features[rows], targets[rows]
        solved[group] = np.linalg.solve(x.T @ x + penalty, x.T @ y)
    return solved
