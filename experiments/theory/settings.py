"""Settings of the theory's checks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from experiments.lib.cli import check_values, option
from experiments.lib.experiment import RunSettings
from experiments.lib.seeding import seeded

STATEMENTS = tuple(str(number) for number in range(1, 13))
# Wrong on purpose: the same checks must refute them.
CONTROLS = ("wrong-2", "wrong-6", "wrong-7")
# Settings that only some statements have a use for.
PART_OF = {
    "noise": ("8",),
    **dict.fromkeys(("outer_lr", "inner_lr"), ("5", "6", "10", "11", "12", "wrong-6")),
}
_SMOKE = 8  # a smoke run has this many times fewer draws


@dataclass(frozen=True)
class TheorySettings(RunSettings):
    """Settings of ``python -m experiments.theory``."""

    statements: tuple[str, ...] = option(
        (*STATEMENTS, *CONTROLS),
        choices=(*STATEMENTS, *CONTROLS),
        positional=True,
        extends=True,
        help="which statements to check",
    )
    seed: int = option(0, help="seed of everything random")
    noise: float = option(0.1, help="statement 8: standard deviation of the noise in the data")
    outer_lr: float = option(0.3, help="LoRA-ML's gradient descent: step size of A")
    inner_lr: float = option(0.005, help="LoRA-ML's gradient descent: step size of the U_t")

    def __post_init__(self) -> None:
        check_values("settings", self, zero=("seed",))

    def draws(self, full: int) -> int:
        """Returns the number of random cases: ``full``, or an eighth of it in a smoke run."""
        return -(-full // _SMOKE) if self.smoke else full

    def within(self, full: float) -> float:
        """Returns the tolerance of an estimate from `draws`, wider in a smoke run."""
        return full * _SMOKE**0.5 if self.smoke else full

    def generator(self, statement: str) -> torch.Generator:
        """Returns a statement's own generator, the same whatever else is run."""
        index = (*STATEMENTS, *CONTROLS).index(statement)
        return seeded(self.seed, index)
