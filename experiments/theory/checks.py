"""Checks: a prediction beside a measurement, and a criterion that the measurement can fail.

Intervals have the level 99.99 %, so that the hundred or so of a run rarely fail by chance. A check
of an estimate also requires a narrow interval: too coarse a measurement verifies nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import betaincinv, ndtri
from torch import Tensor

LEVEL = 0.9999
_Z = float(ndtri((1 + LEVEL) / 2))


@dataclass(frozen=True)
class Check:
    """One criterion, met or not.

    Attributes:
        what: the quantity measured and where.
        predicted: the prediction, with what the criterion allows, as text.
        measured: the number.
        low, high: its interval; both are ``measured`` where nothing random was averaged.
        holds: whether the criterion is met.
    """

    what: str
    predicted: str
    measured: float
    low: float
    high: float
    holds: bool

    @property
    def shown(self) -> str:
        """The measurement with its interval, as text."""
        if self.low == self.high:
            return f"{self.measured:.4g}"
        return f"{self.measured:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class Outcome:
    """A statement's checks, and the numbers behind its figure, if it has one."""

    checks: Sequence[Check]
    data: dict[str, Any] | None = None

    @property
    def holds(self) -> bool:
        """Whether the statement is verified: every check holds, and there is one."""
        return bool(self.checks) and all(c.holds for c in self.checks)

    @property
    def headline(self) -> Check:
        """The check to show: the first that failed, else the first."""
        return next((c for c in self.checks if not c.holds), self.checks[0])


class Checks(list[Check]):
    """The checks of a statement, in the order in which they are made.

    Every method appends a `Check` and returns it.

    Attributes:
        at: where the next checks are made; it follows the name of the quantity.
    """

    at = ""

    def mean_equals(self, what: str, samples: Tensor, predicted: float, within: float) -> Check:
        """Checks that the mean's interval holds the prediction, and is no wider than allowed.

        Allowed is ± ``within`` times the prediction.
        """
        mean, low, high = interval(samples)
        narrow = high - low <= 2 * within * abs(predicted)
        text = f"{predicted:.5g} (±{within:.2g} relative)"
        return self._add(what, text, mean, low, high, low <= predicted <= high and narrow)

    def mean_at_least(self, what: str, samples: Tensor, limit: float) -> Check:
        """Checks that the whole interval of the mean is above the limit."""
        mean, low, high = interval(samples)
        return self._add(what, f">= {limit:.5g}", mean, low, high, low >= limit)

    def exponent_equals(
        self,
        what: str,
        x: Sequence[float],
        samples: Sequence[Tensor],
        predicted: float,
        within: float,
    ) -> Check:
        """Checks that the interval of b in mean(samples) ~ x^b is near the prediction.

        Args:
            what: what the exponent is of.
            x: the values of the abscissa.
            samples: independent measurements at each of them.
            predicted: b.
            within: how far off b may be.
        """
        slope, error = fit_exponent(x, samples)
        low, high = slope - _Z * error, slope + _Z * error
        holds = predicted - within <= low and high <= predicted + within
        return self._add(what, f"{predicted:.3g} ± {within:.2g}", slope, low, high, holds)

    def at_most(self, what: str, measured: float | Tensor, limit: float) -> Check:
        """Checks that a computed number is at most the limit; NaN is not."""
        value = float(measured)
        return self._add(what, f"<= {limit:.3g}", value, value, value, value <= limit)

    def at_least(self, what: str, measured: float | Tensor, limit: float) -> Check:
        """Checks that a computed number is at least the limit; NaN is not."""
        value = float(measured)
        return self._add(what, f">= {limit:.3g}", value, value, value, value >= limit)

    def all_of(self, what: str, hits: Tensor, at_least: int = 1) -> Check:
        """Checks that every case is a hit, and that there are ``at_least`` as many cases."""
        found, cases = int(hits.sum()), hits.numel()
        text = f"all, of >= {at_least}" if at_least > 1 else "all"
        return self._share(what, hits, text, found == cases and cases >= at_least)

    def share_at_least(self, what: str, hits: Tensor, limit: float) -> Check:
        """Checks that the whole interval of a share is above the limit."""
        low, _ = share_interval(int(hits.sum()), hits.numel())
        return self._share(what, hits, f">= {limit:.3g}", low >= limit)

    def share_at_most(self, what: str, hits: Tensor, limit: float) -> Check:
        """Checks that the whole interval of a share is below the limit."""
        _, high = share_interval(int(hits.sum()), hits.numel())
        return self._share(what, hits, f"<= {limit:.3g}", high <= limit)

    def _share(self, what: str, hits: Tensor, text: str, holds: bool) -> Check:
        found, cases = int(hits.sum()), hits.numel()
        low, high = share_interval(found, cases)
        share = found / cases if cases else math.nan
        return self._add(what, text, share, low, high, holds, f" ({found} of {cases})")

    def _add(
        self,
        what: str,
        text: str,
        value: float,
        low: float,
        high: float,
        holds: bool,
        counted: str = "",
    ) -> Check:
        where = f"{what}, {self.at}" if self.at else what
        self.append(Check(where + counted, text, value, low, high, holds))
        return self[-1]


def interval(samples: Tensor) -> tuple[float, float, float]:
    """Returns (mean, low, high) of independent samples, by the normal approximation."""
    mean = float(samples.mean())
    error = _Z * float(samples.std()) / math.sqrt(samples.numel())
    return mean, mean - error, mean + error


def share_interval(found: int, cases: int) -> tuple[float, float]:
    """Returns Clopper and Pearson's exact interval of a binomial share."""
    tail = (1 - LEVEL) / 2
    low = float(betaincinv(found, cases - found + 1, tail)) if found else 0.0
    high = float(betaincinv(found + 1, cases - found, 1 - tail)) if found < cases else 1.0
    return low, high


def fit_exponent(x: Sequence[float], samples: Sequence[Tensor]) -> tuple[float, float]:
    """Fits mean(samples) = a x^b by weighted least squares of logarithms: b, its standard error."""
    means = np.array([float(s.mean()) for s in samples])
    errors = np.array([float(s.std()) / math.sqrt(s.numel()) for s in samples])
    weights = (means / errors) ** 2
    log_x = np.log(np.array(x))
    centred = log_x - np.average(log_x, weights=weights)
    information = float((weights * centred**2).sum())
    slope = float((weights * centred * np.log(means)).sum()) / information
    return slope, 1 / math.sqrt(information)
