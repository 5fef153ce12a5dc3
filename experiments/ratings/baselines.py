"""Baselines of recommender systems: biases of users and items, and matrix factorisation.

Both predict the rating of item i by user u as

    r_ui = mean + b_u + b_i + p_u · q_i,

biases alone with no factors p_u, q_i. They minimise, by alternating least squares,

    Σ (r_ui - mean - b_u - b_i - p_u · q_i)² + a (Σ b_u² + Σ b_i²) + c (Σ |p_u|² + Σ |q_i|²)

over the retraining users' ratings, with ``bias_decay`` a and ``decay`` c. An unseen user is folded
in: with the items' b_i and q_i fixed, b_u and p_u are a ridge regression on the user's own ratings.
For biases alone that is the mean of the residuals, shrunk: b_u = Σ residuals / (n_u + a).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_array

from experiments.ratings.data import HIGHEST, LOWEST, Part, Unseen

STEPS = 15  # of users and items in turn; more change the RMSE of unseen users by less than 1e-3
START = 0.1  # standard deviation of the random start of the items' factors
# What is tried on validation users.
BIAS_DECAYS = (2.0, 5.0, 10.0)
RANKS, DECAYS = (2, 4, 8, 16), (10.0, 20.0, 40.0)
FOLD_IN_BIAS_DECAYS, FOLD_IN_DECAYS = (1.0, 2.0, 5.0, 10.0, 20.0), (2.0, 5.0, 10.0, 20.0)
Decays = Sequence[tuple[float, float]]  # bias_decay and decay


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
        """Returns (b_u, p_u) [U, 1 + k] of the users whose ratings are given."""
        return _solved(*self._normal(shots), bias_decay, decay)

    def fold_ins(self, shots: Part, decays: Decays) -> Iterator[np.ndarray]:
        """Yields what `fold_in` returns, for each pair of decays."""
        normal = self._normal(shots)
        for each in decays:
            yield _solved(*normal, *each)

    def _normal(self, shots: Part) -> tuple[np.ndarray, np.ndarray]:
        residuals = _residuals(shots, len(self.biases), self.mean)
        return _normal(_less(residuals, self.biases), _with_ones(self.factors))

    def predict(self, of_users: np.ndarray, part: Part) -> np.ndarray:
        """Returns the predictions [N] for the ratings of a part, with (b_u, p_u) of its users."""
        items, users = part.items.numpy(), part.tasks.numpy()
        own = (_with_ones(self.factors)[items] * of_users[users]).sum(1)
        return np.clip(self.mean + self.biases[items] + own, LOWEST, HIGHEST)


Candidate = tuple[Factors, Decays]  # a fit to choose, and the decays of its fold-in


def factorize(
    part: Part, num_items: int, rank: int, bias_decay: float, decay: float, seed: int
) -> Factors:
    """Fits the items' biases and factors to ratings, with ``rank`` factors; 0: biases alone."""
    mean = float(part.values.double().mean())
    by_user = _residuals(part, num_items, mean)
    by_item = by_user.T.tocsr()
    start = np.random.default_rng(seed).normal(0, START, (num_items, rank))
    items = np.concatenate([np.zeros((num_items, 1)), start], axis=1)  # (b_i, q_i)
    for _ in range(STEPS):
        normal = _normal(_less(by_user, items[:, 0]), _with_ones(items[:, 1:]))
        users = _solved(*normal, bias_decay, decay)  # (b_u, p_u)
        normal = _normal(_less(by_item, users[:, 0]), _with_ones(users[:, 1:]))
        items = _solved(*normal, bias_decay, decay)
    return Factors(mean, items[:, 0], items[:, 1:])


def candidates(name: str, part: Part, num_items: int, seed: int) -> Iterator[Candidate]:
    """Yields the fits to choose from, each with the (bias_decay, decay) of the fold-in to try.

    Args:
        name: "global-mean", "biases" or "factors".
    """
    if name == "global-mean":
        mean, none = float(part.values.double().mean()), np.zeros((num_items, 0))
        yield Factors(mean, np.zeros(num_items), none), [(np.inf, np.inf)]
    elif name == "biases":
        for bias_decay in BIAS_DECAYS:
            fit = factorize(part, num_items, 0, bias_decay, 1.0, seed)
            yield fit, [(a, 1.0) for a in FOLD_IN_BIAS_DECAYS]
    else:
        for rank, decay in itertools.product(RANKS, DECAYS):
            fit = factorize(part, num_items, rank, 5.0, decay, seed)
            yield fit, list(itertools.product(FOLD_IN_BIAS_DECAYS, FOLD_IN_DECAYS))


def choose(
    fits: Sequence[Candidate], users: Unseen, shots: int
) -> tuple[Factors, tuple[float, float]]:
    """Returns the fit, and the decays of its fold-in, with the lowest error on some users."""
    few, held_out = users.few(shots)
    tried = [(fit, decays) for fit, every in fits for decays in every]
    errors = [
        user_errors(fit.predict(of_users, held_out), held_out).mean()
        for fit, every in fits
        for of_users in fit.fold_ins(few, every)
    ]
    return tried[int(np.argmin(errors))]


def user_errors(predictions: np.ndarray, part: Part) -> np.ndarray:
    """Returns the mean squared error [U] of each user's ratings."""
    errors = (predictions - part.values.numpy()) ** 2
    return np.bincount(part.tasks.numpy(), errors) / part.counts.numpy()


def fitted_biases(predictions: np.ndarray, few: Part, bias_decay: float) -> np.ndarray:
    """Returns the users' biases [U] beside predictions [N]: Σ residuals / (n_u + bias_decay)."""
    residuals = few.values.numpy() - predictions
    return np.bincount(few.tasks.numpy(), residuals) / (few.counts.numpy() + bias_decay)


def _residuals(part: Part, num_items: int, mean: float) -> csr_array:
    """Returns the ratings less the mean, [U, I]."""
    values = part.values.numpy().astype(np.float64) - mean
    where = part.tasks.numpy(), part.items.numpy()
    return csr_array((values, where), shape=(part.num_tasks, num_items))


def _less(residuals: csr_array, biases: np.ndarray) -> csr_array:
    """Returns residuals [R, C] less a bias of each column, where there are any."""
    values = residuals.data - biases[residuals.indices]
    return csr_array((values, residuals.indices, residuals.indptr), shape=residuals.shape)


def _with_ones(factors: np.ndarray) -> np.ndarray:
    """[n, k] → [n, 1 + k], with a first column of ones."""
    return np.concatenate([np.ones((len(factors), 1)), factors], axis=1)


def _normal(targets: csr_array, features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the normal equations of a regression for each row: [R, 1 + k, 1 + k], [R, 1 + k].

    Args:
        targets: [R, C], those that there are.
        features: [C, 1 + k] of each column, the first for the bias.
    """
    width, ones = features.shape[1], np.ones_like(targets.data)
    there = csr_array((ones, targets.indices, targets.indptr), shape=targets.shape)
    pairs = (features[:, :, None] * features[:, None, :]).reshape(len(features), -1)
    return (there @ pairs).reshape(-1, width, width), targets @ features


def _solved(gram: np.ndarray, right: np.ndarray, bias_decay: float, decay: float) -> np.ndarray:
    """Solves a ridge regression for each row; returns its coefficients [R, 1 + k].

    Args:
        gram, right: of `_normal`.
        bias_decay, decay: of the first coefficient, and of each other; infinity leaves zeros.
    """
    if np.isinf(bias_decay):
        return np.zeros_like(right)
    penalty = np.diag([bias_decay] + [decay] * (right.shape[1] - 1))
    return np.linalg.solve(gram + penalty, right[:, :, None])[:, :, 0]
