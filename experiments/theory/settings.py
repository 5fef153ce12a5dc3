"""Settings of the theory's checks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from experiments.lib.cli import option
from metalora._checks import check_choice, check_count, check_positive

STATEMENTS = tuple(str(number) for number in range(1, 13))
# Wrong on purpose: the same checks must refute them.
CONTROLS = ("wrong-2", "wrong-6", "wrong-7")
# Settings that only some statements have a use for.
PART_OF = {
    "noise": ("8",),
    **dict.fromkeys(("outer_lr", "inner_lr"), ("5", "6", "10", "11", "12", "wrong-6")),
}
_SMOKE = 8  # so many times fewer draws


@dataclass(frozen=True)
class TheorySettings:
    """Settings of ``python -m experiments.theory``."""

    statements: tuple[str, ...] = option(
        (*STATEMENTS, *CONTROLS),
        choices=(*STATEMENTS, *CONTROLS),
        positional=True,
        help="which statements to check",
    )
    seed: int = option(0, help="seed of everything random")
    noise: float = option(0.1, help="statement 8: standard deviation of the noise in the data")
    outer_lr: float = option(0.3, help="LoRA-ML's gradient descent: step size of A")
    inner_lr: float = option(0.005, help="LoRA-ML's gradient descent: step size of the U_t")
    smoke: bool = option(False, help="a run of seconds: fewer draws, wider intervals allowed")
    out: Path | None = option(None, run_only=True, help="folder to write (default: under runs/)")
    resume: bool = option(False, run_only=True, help="go on with the run in --out")

    def __post_init__(self) -> None:
        for statement in self.statements:
            check_choice("settings", "statements", statement, (*STATEMENTS, *CONTROLS))
        check_count("settings", "seed", self.seed, minimum=0)
        check_positive("settings", "noise", self.noise)
        check_positive("settings", "outer_lr", self.outer_lr)
        check_positive("settings", "inner_lr", self.inner_lr)

    def draws(self, full: int) -> int:
        """How many random cases: so many, or an eighth of them in a smoke run."""
        return -(-full // _SMOKE) if self.smoke else full

    def within(self, full: float) -> float:
        """The tolerance of an estimate from `draws`, wider as the interval gets."""
        return full * _SMOKE**0.5 if self.smoke else full

    def generator(self, statement: str) -> torch.Generator:
        """A statement's own randomness, whatever else is run."""
        index = (*STATEMENTS, *CONTROLS).index(statement)
        entropy = np.random.SeedSequence([self.seed, index])
        return torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
