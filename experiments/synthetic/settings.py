"""Settings of the linear model's experiment and the points of Figure 1's sweeps."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments.cli import option
from metalora._checks import check_choice, check_count, check_nonnegative, check_positive

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
        finetune_steps: number of gradient steps in fine-tuning.
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
    smoke: bool = option(False, help="a run of seconds with few steps; its numbers mean nothing")
    out: Path | None = option(None, run_only=True, help="folder to write (default: under runs/)")
    resume: bool = option(False, run_only=True, help="go on with the run in --out")

    def __post_init__(self) -> None:
        check_choice("settings", "vary", self.vary, [*SWEEPS, "all"])
        check_count("settings", "trials", self.trials)
        check_count("settings", "seed", self.seed, minimum=0)
        check_count("settings", "outer_steps", self.outer_steps)
        check_count("settings", "inner_steps", self.inner_steps)
        if self.finetune_steps is not None:
            check_count("settings", "finetune_steps", self.finetune_steps, minimum=20)
        for name in ("outer_lr", "inner_lr", "finetune_lr"):
            check_positive("settings", name, getattr(self, name))
        check_nonnegative("settings", "noise", self.noise)

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
        return [self._point(vary, value) for vary in sweeps for value in SWEEPS[vary]]

    def _point(self, vary: str, value: int) -> Point:
        at = {**BASE, vary: value}
        return Point(
            vary=vary,
            value=value,
            num_tasks=at["T"],
            finetune_samples=at["n"],
            retrain_samples=at["N"],
            rank=at["k"],
            dim=at["d"],
            # Two tasks determine A* only up to rank 2k (paper, theorem 3.2 and corollary 1).
            finetune_rank=3 * at["k"] if at["T"] == 2 else at["k"],
            finetune_steps=self.finetune_steps or FINETUNE_STEPS[vary],
        )
