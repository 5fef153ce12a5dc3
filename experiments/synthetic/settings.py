"""Settings of the synthetic experiments, and the points of their sweeps."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.lib.cli import MOST_TRIALS, option
from metalora._checks import check_choice, check_count, check_nonnegative, check_positive
from metalora.shallow.network import INITIALIZATIONS

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
FINETUNE_STEPS = {"T": 10000, "n": 1000, "N": 1000, "k": 10000, "d": 1400}
# The same for the shallow network (paper, D.2).
SHALLOW_SWEEPS = {
    "T": (2, 3, 5),
    "n": (100, 1000, 10000),
    "N": (100, 1000, 10000),
    "k": (1, 3, 5),
    "d": (5, 10, 20),
}
SHALLOW_BASE = {"T": 3, "n": 100, "N": 1000, "k": 1, "d": 10}
DEVICES = ("cpu", "cuda")


def check_device(device: str) -> None:
    """Raises ValueError for a device that is unknown or not there."""
    check_choice("settings", "device", device, DEVICES)
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("settings: device must be cpu here, got 'cuda': torch finds no GPU")


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

    @classmethod
    def at(cls, vary: str, value: int, base: Mapping[str, int], finetune_steps: int) -> Point:
        """The point at which ``vary`` has this value and the others those of ``base``."""
        sizes = {**base, vary: value}
        return cls(
            vary=vary,
            value=value,
            num_tasks=sizes["T"],
            finetune_samples=sizes["n"],
            retrain_samples=sizes["N"],
            rank=sizes["k"],
            dim=sizes["d"],
            # Two tasks determine A* only up to rank 2k (paper, theorem 3.2 and corollary 1).
            finetune_rank=3 * sizes["k"] if sizes["T"] == 2 else sizes["k"],
            finetune_steps=finetune_steps,
        )


@dataclass(frozen=True)
class LinearSettings:
    """Settings of ``linear``; the defaults are those of the paper (section 3, D.1)."""

    vary: str = option("all", choices=[*SWEEPS, "all"], help="the sweep of Figure 1 to run")
    trials: int = option(5, help="random problems per setting")
    seed: int = option(0, help="seed of everything random")
    outer_steps: int = option(3000, help="retraining: steps on the shared weights, both methods")
    inner_steps: int = option(10, help="LoRA-ML: steps on the adapters before each of them")
    outer_lr: float = option(0.03, help="retraining: step size of the shared weights, both methods")
    inner_lr: float = option(0.003, help="LoRA-ML: step size of the adapters")
    finetune_lr: float = option(0.005, help="fine-tuning: step size")
    finetune_steps: int | None = option(
        None, help="fine-tuning: steps (default: 10000 for T and k, 1400 for d, 1000 for n and N)"
    )
    noise: float = option(0.1, help="standard deviation of the noise in the data")
    symmetric_base: bool = option(
        False, help="a symmetric A*, (A + Aᵀ) / 2, as in the authors' runs"
    )
    one_truth: bool = option(
        False,
        help="one random problem for all trials of a setting, as in the authors' runs: the band is "
        "then over data alone",
    )
    smoke: bool = option(False, help="a run of seconds with few steps; its numbers mean nothing")
    device: str = option("cpu", choices=DEVICES, run_only=True, help="where to train")
    out: Path | None = option(None, run_only=True, help="folder to write (default: under runs/)")
    resume: bool = option(False, run_only=True, help="go on with the run in --out")

    def __post_init__(self) -> None:
        check_choice("settings", "vary", self.vary, [*SWEEPS, "all"])
        check_count("settings", "trials", self.trials, maximum=MOST_TRIALS)
        check_count("settings", "seed", self.seed, minimum=0)
        check_count("settings", "outer_steps", self.outer_steps)
        check_count("settings", "inner_steps", self.inner_steps)
        if self.finetune_steps is not None:
            check_count("settings", "finetune_steps", self.finetune_steps, minimum=20)
        for name in ("outer_lr", "inner_lr", "finetune_lr"):
            check_positive("settings", name, getattr(self, name))
        check_nonnegative("settings", "noise", self.noise)
        check_device(self.device)

    def shortened(self) -> LinearSettings:
        """These settings, cut down to a run of seconds if ``smoke`` is set."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            trials=min(self.trials, 2),
            outer_steps=min(self.outer_steps, 20),
            finetune_steps=min(self.finetune_steps or 50, 50),
        )

    def points(self) -> list[Point]:
        """The settings to run, sweep by sweep."""
        sweeps = list(SWEEPS) if self.vary == "all" else [self.vary]
        return [
            Point.at(vary, value, BASE, self.finetune_steps or FINETUNE_STEPS[vary])
            for vary in sweeps
            for value in SWEEPS[vary]
        ]


@dataclass(frozen=True)
class ShallowSettings:
    """Settings of ``shallow``; the defaults are those of the paper (D.2)."""

    vary: str = option("all", choices=[*SHALLOW_SWEEPS, "all"], help="the sweep to run")
    trials: int = option(10, help="random problems per setting")
    seed: int = option(0, help="seed of everything random")
    retrain_epochs: int = option(40000, help="retraining: epochs, each a step on all samples")
    finetune_epochs: int = option(15000, help="fine-tuning: epochs")
    lr: float = option(0.001, help="AdamW's learning rate, in retraining and fine-tuning")
    weight_decay: float = option(0.01, help="AdamW's weight decay")
    init: str = option(
        "uniform",
        choices=INITIALIZATIONS,
        help="start of A and c: as in torch.nn.Linear, or N(0, 1) as the true ones",
    )
    noise: float = option(0.1, help="standard deviation of the noise in the data")
    dtype: str = option("float32", choices=["float32", "float64"], help="precision, as torch's")
    smoke: bool = option(False, help="a run of seconds with few epochs; its numbers mean nothing")
    out: Path | None = option(None, run_only=True, help="folder to write (default: under runs/)")
    resume: bool = option(False, run_only=True, help="go on with the run in --out")

    def __post_init__(self) -> None:
        check_choice("settings", "vary", self.vary, [*SHALLOW_SWEEPS, "all"])
        check_choice("settings", "init", self.init, INITIALIZATIONS)
        check_choice("settings", "dtype", self.dtype, ["float32", "float64"])
        check_count("settings", "trials", self.trials, maximum=MOST_TRIALS)
        check_count("settings", "seed", self.seed, minimum=0)
        check_count("settings", "retrain_epochs", self.retrain_epochs)
        check_count("settings", "finetune_epochs", self.finetune_epochs)
        check_positive("settings", "lr", self.lr)
        check_nonnegative("settings", "weight_decay", self.weight_decay)
        check_nonnegative("settings", "noise", self.noise)

    def shortened(self) -> ShallowSettings:
        """These settings, cut down to a run of seconds if ``smoke`` is set."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            trials=min(self.trials, 2),
            retrain_epochs=min(self.retrain_epochs, 20),
            finetune_epochs=min(self.finetune_epochs, 20),
        )

    def points(self) -> list[Point]:
        """The settings to run, sweep by sweep."""
        sweeps = list(SHALLOW_SWEEPS) if self.vary == "all" else [self.vary]
        return [
            Point.at(vary, value, SHALLOW_BASE, self.finetune_epochs)
            for vary in sweeps
            for value in SHALLOW_SWEEPS[vary]
        ]
