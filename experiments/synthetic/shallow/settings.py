"""Settings of ``shallow``; the defaults are those of the paper (D.2)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.lib.cli import option
from experiments.synthetic.settings import BASE, SWEEPS, SweepSettings
from metalora.shallow.network import INITIALIZATIONS


@dataclass(frozen=True)
class ShallowSettings(SweepSettings):
    """Settings of one run."""

    SMOKE = {"trials": 2, "retrain_epochs": 20, "finetune_epochs": 20}  # noqa: RUF012
    SWEEPS = {**SWEEPS, "k": (1, 3, 5)}  # noqa: RUF012
    BASE = {**BASE, "N": 1000}  # noqa: RUF012

    trials: int = option(10, help="random problems per setting")
    retrain_epochs: int = option(40000, help="retraining: epochs, each a step on all samples")
    finetune_epochs: int = option(15000, help="fine-tuning: epochs")
    lr: float = option(0.001, help="AdamW's learning rate, in retraining and fine-tuning")
    weight_decay: float = option(0.01, help="AdamW's weight decay")
    init: str = option(
        "uniform",
        choices=INITIALIZATIONS,
        help="start of A and c: as in torch.nn.Linear, or N(0, 1) as the true ones",
    )
    dtype: str = option("float32", choices=["float32", "float64"], help="precision, as torch's")

    def finetune_length(self, vary: str) -> int:
        """Returns the number of fine-tuning epochs, the same in every sweep."""
        return self.finetune_epochs
