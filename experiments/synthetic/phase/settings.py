"""Settings of the phase diagrams."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from experiments.lib.cli import option
from experiments.synthetic.settings import DEVICES, SyntheticSettings, check_device

RETRAIN_TASKS = 3  # T in the diagram over n: the fewest for which theory promises recovery


@dataclass(frozen=True)
class PhaseSettings(SyntheticSettings):
    """Settings of ``phase``; the grid takes two CPU cores a few minutes.

    The steps are larger than in the paper: the population loss allows it, and with a step of 1 A is
    always at its optimum for the present adapters.
    """

    SMOKE = {"trials": 2, "outer_steps": 1000, "finetune_steps": 1000}  # noqa: RUF012

    dim: int = option(12, help="d")
    tasks: tuple[int, ...] = option((2, 3, 4, 5, 6, 8, 10), help="values of T", extends=True)
    ranks: tuple[int, ...] = option((1, 2, 3, 4, 5, 6, 7, 8), help="values of k", extends=True)
    samples: tuple[int, ...] = option(
        (6, 8, 10, 11, 12, 13, 14, 16, 20, 24, 32, 48), help="values of n, of the test task"
    )
    trials: int = option(20, help="random problems per cell")
    tolerance: float = option(0.001, help="largest relative error that counts as recovery")
    outer_steps: int = option(6000, help="retraining: steps on the shared weights")
    inner_steps: int = option(10, help="retraining: steps on the adapters before each of them")
    outer_lr: float = option(1.0, help="retraining: step size of the shared weights")
    inner_lr: float = option(0.006, help="retraining: step size of the adapters")
    finetune_steps: int = option(20000, help="fine-tuning: steps")
    finetune_lr: float = option(0.006, help="fine-tuning: step size")
    device: str = option("cpu", choices=DEVICES, run_only=True, help="where to train")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tasks", "ranks", "samples"):
            given = getattr(self, name)
            if len(set(given)) < len(given):
                raise ValueError(f"settings: {name} must differ, got {given}")
        if max(self.ranks) > self.dim:
            raise ValueError(
                f"settings: ranks must be at most dim = {self.dim}, got {max(self.ranks)}"
            )
        check_device(self.device)

    def shortened(self) -> PhaseSettings:
        """Returns these settings, reduced to a run of seconds if ``smoke`` is set."""
        if not self.smoke:
            return self
        return dataclasses.replace(
            super().shortened(),
            tasks=self.tasks[:3],
            ranks=self.ranks[:3],
            samples=self.samples[-3:],
        )
