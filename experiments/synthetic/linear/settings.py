"""Settings of ``linear``; the defaults are those of the paper (section 3, D.1)."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.lib.cli import option
from experiments.synthetic.settings import DEVICES, SweepSettings, check_device
from metalora._checks import check_count

ENGINES = ("native", "layers")
FINETUNE_STEPS = {"T": 10000, "n": 1000, "N": 1000, "k": 10000, "d": 1400}


@dataclass(frozen=True)
class LinearSettings(SweepSettings):
    """Settings of one run."""

    SMOKE = {"trials": 2, "outer_steps": 20, "finetune_steps": 50}  # noqa: RUF012

    outer_steps: int = option(3000, help="retraining: steps on the shared weights, both methods")
    inner_steps: int = option(10, help="LoRA-ML: steps on the adapters before each of them")
    outer_lr: float = option(0.03, help="retraining: step size of the shared weights, both methods")
    inner_lr: float = option(0.003, help="LoRA-ML: step size of the adapters")
    finetune_lr: float = option(0.005, help="fine-tuning: step size")
    finetune_steps: int | None = option(
        None, help="fine-tuning: steps (default: 10000 for T and k, 1400 for d, 1000 for n and N)"
    )
    symmetric_base: bool = option(
        False, help="a symmetric A*, (A + Aᵀ) / 2, as in the authors' runs"
    )
    one_truth: bool = option(
        False,
        help="one random problem for all trials of a setting, as in the authors' runs: the band is "
        "then over data alone",
    )
    engine: str = option(
        "native",
        choices=ENGINES,
        help="native trainers on sufficient statistics, or modules and autograd on the samples, "
        "which give the same far more slowly",
    )
    device: str = option("cpu", choices=DEVICES, run_only=True, help="where to train")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.finetune_steps is not None:
            check_count("settings", "--finetune-steps", self.finetune_steps, minimum=20)
        check_device(self.device)

    def finetune_length(self, vary: str) -> int:
        """Returns the number of fine-tuning steps in a sweep; the paper's, unless one was given."""
        return self.finetune_steps or FINETUNE_STEPS[vary]
