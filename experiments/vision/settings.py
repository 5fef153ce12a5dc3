"""Settings of the vision experiment; the defaults are the paper's or, for the digits, tuned.

The digits' defaults were chosen without the test task, by fine-tuning on 10 and 50 images of the
digits 6 and 7 after retraining on the three pairs before them (``--tasks 0-1 2-3 4-5 6-7``). For
each method: retraining rates 1e-3, 3e-3, 1e-2, 2e-2 (Reptile: seven sets of inner optimiser, inner
and outer rate), each with fine-tuning rates from 1e-3 to 1e-1, one or two trials. One retraining
rate was best, or as good as the best, for all methods that have one, and one fine-tuning rate
for all four.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from experiments.lib.cli import flag_of, option, unique
from experiments.lib.retraining_settings import ALL, FINETUNES, RetrainingSettings, part_of
from experiments.vision.augment import Augmentation
from experiments.vision.data import Pair
from experiments.vision.mixer import MixerConfig

PAIRS = ("0-1", "2-3", "4-5", "6-7", "8-9")

CIFAR10 = ("cifar10", "cifar10-16")

# What stands for None. CIFAR-10: the paper's appendix E.1; digits: see above; cifar10-16, which has
# images of 16 x 16 pixels: chosen on the classes 6 and 7, see docs/vision.md. The inner rate and
# steps are those of "tuned" Reptile.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {
        "epochs": 100,
        "batch_size": 256,
        "lr": 1e-4,
        "weight_decay": 1e-5,
        "finetune_epochs": 100,
        "finetune_batch_size": 256,
        "finetune_lr": 5e-4,
        "reptile_inner_lr": 1e-4,
        "reptile_inner_steps": 20,
    },
    "cifar10-16": {
        "epochs": 50,
        "batch_size": 256,
        "lr": 1e-3,
        "weight_decay": 1e-5,
        "finetune_epochs": 50,
        "finetune_batch_size": 256,
        "finetune_lr": 3e-2,
        "reptile_inner_lr": 1e-3,
        "reptile_inner_steps": 20,
    },
    "digits": {
        "epochs": 20,
        "batch_size": 32,
        "lr": 1e-2,
        "weight_decay": 1e-5,
        "finetune_epochs": 50,
        "finetune_batch_size": 32,
        "finetune_lr": 3e-2,
        "reptile_inner_lr": 3e-3,
        "reptile_inner_steps": 7,
    },
}
# "paper": 20 outer steps of Adam at 1e-5 in all, so W hardly leaves its random start.
# "tuned": it sees as many images as the other methods, and W goes half the way to each task's
# solution. Inner rate: digits, tuned; CIFAR-10, that of the other methods.
REPTILE: Mapping[str, Mapping[str, Any]] = {
    "paper": {
        "reptile_epochs": 5,
        "reptile_optimizer": "adam",
        "reptile_lr": 1e-5,
        "reptile_inner_optimizer": "sgd",
        "reptile_inner_lr": 1e-2,
        "reptile_inner_steps": 20,
    },
    "tuned": {
        "reptile_optimizer": "sgd",
        "reptile_lr": 0.5,
        "reptile_inner_optimizer": "adam",
    },
}
SMOKE = {
    "epochs": 1,
    "reptile_epochs": 1,
    "finetune_epochs": 2,
    "seeds": 2,
    "train_per_class": 32,
    "held_out_per_class": 32,
}
MODELS = {
    "cifar10": MixerConfig(),
    "cifar10-16": MixerConfig(image_size=16, width=192, token_hidden=64, channel_hidden=96),
    "digits": MixerConfig(
        image_size=8, channels=1, patch_size=2, width=64, token_hidden=64, channel_hidden=32
    ),
}
# Mirrored digits are no digits.
AUGMENTATIONS = {
    "cifar10": Augmentation(4, flip=True),
    "cifar10-16": Augmentation(2, flip=True),
    "digits": Augmentation(1, flip=False),
}


@dataclasses.dataclass(frozen=True)
class VisionSettings(RetrainingSettings):
    """Settings of one run; None stands for the data set's default."""

    command: ClassVar[str] = "vision"

    data: str = option("cifar10", help="the images", choices=tuple(DEFAULTS))
    data_root: Path = option(Path("data"), help="where CIFAR-10 is", run_only=True)
    download: bool = option(False, help="have torchvision download CIFAR-10", run_only=True)
    shots: tuple[str, ...] = option(
        (ALL,),
        help="images of the test task to fine-tune on: one or several numbers, or all",
        extends=True,
    )
    draws: int = option(
        1, help="how often few images are drawn and fine-tuned on in each trial", extends=True
    )
    tasks: tuple[str, ...] = option(PAIRS, help="pairs of classes; the last is the test task")
    epochs: int = option(None, help="of retraining (cifar10: 100, cifar10-16: 50, digits: 20)")
    batch_size: int = option(
        None, help="of a batch; pooled: of all tasks together (256; digits: 32)"
    )
    lr: float = option(None, help="of retraining (cifar10: 1e-4, cifar10-16: 1e-3, digits: 1e-2)")
    weight_decay: float = option(None, help="of all optimisers but inner ones (1e-5)")
    finetune_epochs: int = option(None, help="of fine-tuning (cifar10: 100, others: 50)")
    finetune_batch_size: int = option(None, help="(256; digits: 32)")
    finetune_lr: float = option(None, help="(cifar10: 5e-4, others: 3e-2)")
    finetune_lrs: tuple[float, ...] = option(
        (),
        help="several learning rates of fine-tuning, run one by one, to choose from",
        extends=True,
    )
    finetune_lr_from: Path | None = option(
        None,
        help="take the learning rate of each fine-tuning from the run in this folder: the one of "
        "its --finetune-lrs with the highest accuracy in the last epoch. Its test task must be "
        "another",
    )
    rank: int = option(1, help="of LoRA, on every linear layer, with scale 1")
    bias: bool = option(True, help="linear layers have a bias; the authors' runs leave it out")
    augment: str = option(
        "fresh",
        help="random crops (and flips) in every epoch, once and for all, or never",
        choices=("fresh", "frozen", "none"),
    )
    reptile: str = option(
        "tuned", help="Reptile as the paper ran it, or with a fair setting", choices=tuple(REPTILE)
    )
    reptile_sign: str = option(
        "towards", help="the authors' vision runs step away", choices=("towards", "away")
    )
    reptile_epochs: int = option(None, help="(paper: 5, tuned: those of the others)")
    reptile_optimizer: str = option(
        None, help="outer (paper: adam, tuned: sgd)", choices=("adam", "sgd")
    )
    reptile_lr: float = option(None, help="outer (paper: 1e-5, tuned: 0.5)")
    reptile_inner_optimizer: str = option(
        None, help="(paper: sgd, tuned: adam)", choices=("adam", "sgd")
    )
    reptile_inner_lr: float = option(
        None, help="(paper: 1e-2, tuned: 1e-4; cifar10-16: 1e-3, digits: 3e-3)"
    )
    reptile_inner_steps: int = option(None, help="(20; digits tuned: 7)")
    train_per_class: int | None = option(None, help="use only so many training images a class")
    held_out_per_class: int | None = option(None, help="use only so many held-out images a class")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("shots", "finetune_lrs"):
            object.__setattr__(self, name, unique(getattr(self, name)))
        for shots in self.shots:
            if shots != ALL and not (shots.isdecimal() and int(shots) >= 2):
                raise ValueError(f"argument --shots: must be numbers >= 2 or all, got {shots!r}")
        if self.draws > 1 and set(self.shots) == {ALL}:
            raise ValueError("argument --draws: is for few images; give their numbers with --shots")
        if self.finetune_lrs and self.finetune_lr_from is not None:
            raise ValueError("argument --finetune-lrs: contradicts --finetune-lr-from")
        if len(self.tasks) < 2:
            raise ValueError("argument --tasks: needs a retraining task and the test task")
        self.pairs()

    def kinds(self) -> set[str]:
        """Returns the methods, fine-tunings and data of this run."""
        return {*self.retrain, *self.finetune, *self.refitted(PART_OF), self.data}

    def rates(self) -> tuple[float, ...]:
        """Returns the fine-tuning rates to run, where no other run has chosen one."""
        return self.finetune_lrs or (self.finetune_lr,)

    def pairs(self) -> list[Pair]:
        """Returns the tasks' classes; the last pair is the test task's."""
        pairs: list[Pair] = []
        for text in self.tasks:
            first, _, second = text.partition("-")
            if not (first.isdecimal() and second.isdecimal()):
                raise ValueError(f"argument --tasks: must be pairs such as 0-1, got {text!r}")
            pair = int(first), int(second)
            if max(pair) > 9 or pair[0] == pair[1]:
                raise ValueError(
                    f"argument --tasks: must be pairs of two classes from 0 to 9, got {text!r}"
                )
            pairs.append(pair)
        return pairs

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        values = {**DEFAULTS[self.data], **REPTILE[self.reptile], "seeds": 5}
        if self.smoke:
            values |= SMOKE
        if self.epochs is not None and "reptile_epochs" not in REPTILE[self.reptile]:
            values["reptile_epochs"] = self.epochs
        values.setdefault("reptile_epochs", values["epochs"])
        for name in ("finetune_lrs", "finetune_lr_from"):
            if self.finetune_lr is not None and getattr(self, name):
                raise ValueError(f"argument --finetune-lr: contradicts {flag_of(name)}")
        return values


# Settings that only some methods, fine-tunings or data have a use for; the others are for all.
PART_OF = part_of(
    VisionSettings,
    {
        **dict.fromkeys(("data_root", "download"), CIFAR10),
        **dict.fromkeys(("shots", "draws"), FINETUNES),
        "shared_head": ("last-layer-ml",),
        "rank": ("lora-ml", "lora"),
        "finetune_head": ("last-layer",),
    },
)
