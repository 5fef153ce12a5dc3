"""Settings of ``shallow``; the defaults are those of the paper (D.2)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.lib.cli import option
from experiments.synthetic.settings import BASE as FIGURE_1_BASE
from experiments.synthetic.settings import SWEEPS as FIGURE_1
from experiments.synthetic.settings import Point, SyntheticSettings, sweep_points
from metalora.shallow.network import INITIALIZATIONS

SWEEPS = {**FIGURE_1, "k": (1, 3, 5)}
BASE = {**FIGURE_1_BASE, "N": 1000}


@dataclass(frozen=True)
class ShallowSettings(SyntheticSettings):
    """Settings of one run."""

    SMOKE = {"trials": 2, "retrain_epochs": 20, "finetune_epochs": 20}  # noqa: RUF012

    vary: str = option("all", choices=[*SWEEPS, "all"], help="the sweep to run")
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
    noise: float = option(0.1, help="standard deviation of the noise in the data")
    dtype: str = option("float32", choices=["float32", "float64"], help="precision, as torch's")

    def points(self) -> list[Point]:
        """The settings to run, sweep by sweep."""
        steps = dict.fromkeys(SWEEPS, self.finetune_epochs)
        return sweep_points(self.vary, SWEEPS, BASE, steps)
