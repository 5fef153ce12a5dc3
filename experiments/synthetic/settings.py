"""Settings shared by the synthetic experiments, and the points of their sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch

from experiments.lib.cli import MOST_TRIALS, check_values, option
from experiments.lib.experiment import RunSettings
from metalora._checks import check_choice

METHODS = ("lora-ml", "standard")
DEVICES = ("cpu", "cuda")
# The varied parameter's values in each sweep of Figure 1; the others stay at BASE.
SWEEPS = {
    "T": (2, 3, 5),
    "n": (100, 1000, 10000),
    "N": (100, 1000, 10000),
    "k": (1, 2, 3),
    "d": (5, 10, 20),
}
# N when k varies: Figure 1's 5000; the table in the paper's appendix D.1 prints 1000.
BASE = {"T": 3, "n": 100, "N": 5000, "k": 1, "d": 10}
Synthetic = TypeVar("Synthetic", bound="SyntheticSettings")


def check_device(device: str) -> None:
    """Raises ValueError for a device that is unknown or not there."""
    check_choice("settings", "device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("settings: device must be cpu here, got 'cuda': torch finds no GPU")


@dataclass(frozen=True)
class SyntheticSettings(RunSettings):
    """Settings of every synthetic experiment.

    Attributes:
        SMOKE: the largest values that ``smoke`` leaves.
    """

    SMOKE: ClassVar[Mapping[str, int]] = {}

    trials: int = option(5, help="random problems per setting")
    seed: int = option(0, help="seed of everything random")

    def __post_init__(self) -> None:
        zero, most = ("seed", "noise", "weight_decay"), {"trials": MOST_TRIALS}
        check_values("settings", self, zero=zero, most=most)

    def shortened(self: Synthetic) -> Synthetic:
        """Returns these settings, reduced to a run of seconds if ``smoke`` is set."""
        if not self.smoke:
            return self
        values: dict[str, Any] = {}
        for name, most in self.SMOKE.items():
            values[name] = min(getattr(self, name) or most, most)
        return dataclasses.replace(self, **values)


@dataclass(frozen=True)
class Point:
    """One setting of one sweep.

    Attributes:
        vary: the parameter varied.
        value: its value.
        num_tasks: T, retraining tasks.
        finetune_samples: n, of the test task.
        retrain_samples: N, of each retraining task.
        rank: k, of the true adapters and of those in retraining.
        dim: d.
        finetune_rank: r, of the adapter in fine-tuning.
        finetune_steps: number of steps in fine-tuning.
    """

    vary: str
    value: int
    num_tasks: int
    finetune_samples: int
    retrain_samples: int
    rank: int
    dim: int
    finetune_rank: int
    finetune_steps: int

    @property
    def name(self) -> str:
        return f"{self.vary}={self.value}"


@dataclass(frozen=True)
class SweepSettings(SyntheticSettings):
    """Settings of an experiment that varies one parameter at a time.

    Attributes:
        SWEEPS: the values of each parameter that is varied.
        BASE: the values of those that are not.
    """

    SWEEPS: ClassVar[Mapping[str, tuple[int, ...]]] = SWEEPS
    BASE: ClassVar[Mapping[str, int]] = BASE

    vary: str = option("all", choices=[*SWEEPS, "all"], help="the sweep to run")
    noise: float = option(0.1, help="standard deviation of the noise in the data")

    def finetune_length(self, vary: str) -> int:
        """Returns the number of fine-tuning steps in a sweep."""
        raise NotImplementedError

    def points(self) -> list[Point]:
        """Returns the points to run, sweep by sweep."""
        sweeps = self.SWEEPS if self.vary == "all" else (self.vary,)
        return [self._point(vary, value) for vary in sweeps for value in self.SWEEPS[vary]]

    def _point(self, vary: str, value: int) -> Point:
        sizes = {**self.BASE, vary: value}
        return Point(
            vary=vary,
            value=value,
            num_tasks=sizes["T"],
            finetune_samples=sizes["n"],
            retrain_samples=sizes["N"],
            rank=sizes["k"],
            dim=sizes["d"],
            # Two tasks determine A* only up to rank 2k (paper, theorem 3.2 and corollary 1).
            finetune_rank=3 * sizes["k"] if sizes["T"] == 2 else sizes["k"],
            finetune_steps=self.finetune_length(vary),
        )
