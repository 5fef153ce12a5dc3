"""Settings of the phase diagrams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.cli import MOST_TRIALS, option
from experiments.synthetic.settings import DEVICES, check_device
from metalora._checks import check_count, check_positive

RETRAIN_TASKS = 3  # T in the diagram over n: the fewest for which theory promises recovery


@dataclass(frozen=True)
class PhaseSettings:
    """Settings of ``phase``; the grid takes two CPU cores a few minutes.

    The steps are larger than in the paper: the population loss allows it, and with a step of 1 A is
    always at its optimum for the present adapters.
    """

    dim: int = option(12, help="d")
    tasks: tuple[int, ...] = option((2, 3, 4, 5, 6, 8, 10), help="values of T")
    ranks: tuple[int, ...] = option((1, 2, 3, 4, 5, 6, 7, 8), help="values of k")
    samples: tuple[int, ...] = option(
        (6, 8, 10, 11, 12, 13, 14, 16, 20, 24, 32, 48), help="values of n, of the test task"
    )
    trials: int = option(20, help="random problems per cell")
    seed: int = option(0, help="seed of everything random")
    tolerance: float = option(0.001, help="largest relative error that counts as recovery")
    outer_steps: int = option(6000, help="retraining: steps on the shared weights")
    inner_steps: int = option(10, help="retraining: steps on the adapters before each of them")
    outer_lr: float = option(1.0, help="retraining: step size of the shared weights")
    inner_lr: float = option(0.006, help="retraining: step size of the adapters")
    finetune_steps: int = option(20000, help="fine-tuning: steps")
    finetune_lr: float = option(0.006, help="fine-tuning: step size")
    smoke: bool = option(False, help="a run of seconds with few cells and steps")
    device: str = option("cpu", choices=DEVICES, run_only=True, help="where to train")
    out: Path | None = option(None, run_only=True, help="folder to write (default: under runs/)")
    resume: bool = option(False, run_only=True, help="go on with the run in --out")

    def __post_init__(self) -> None:
        for name in ("tasks", "ranks", "samples"):
            for value in getattr(self, name):
                check_count("settings", name, value)
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"settings: {name} must differ, got {getattr(self, name)}")
        check_count("settings", "trials", self.trials, maximum=MOST_TRIALS)
        for name in ("dim", "outer_steps", "inner_steps", "finetune_steps"):
            check_count("settings", name, getattr(self, name))
        check_count("settings", "seed", self.seed, minimum=0)
        for name in ("tolerance", "outer_lr", "inner_lr", "finetune_lr"):
            check_positive("settings", name, getattr(self, name))
        if max(self.ranks) > self.dim:
            raise ValueError(
                f"settings: ranks must be at most dim = {self.dim}, got {max(self.ranks)}"
            )
        check_device(self.device)

    def shortened(self) -> PhaseSettings:
        """These settings, cut down to a run of seconds if ``smoke`` is set."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            self,
            tasks=self.tasks[:3],
            ranks=self.ranks[:3],
            samples=self.samples[-3:],
            trials=min(self.trials, 2),
            outer_steps=min(self.outer_steps, 1000),
            finetune_steps=min(self.finetune_steps, 1000),
        )
