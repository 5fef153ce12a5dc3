"""Settings of the conflict experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from experiments.lib.cli import flag_of, option, unique
from experiments.lib.retraining_settings import (
    ALL,
    PER_TASK,
    RetrainingSettings,
    part_of,
)
from experiments.vision import settings as vision


@dataclass(frozen=True)
class Method:
    """What a retraining is made of.

    Attributes:
        base: the method of `experiments.lib.retraining_settings.METHODS`.
        heads: whether each task has a head of its own.
        large_batches: whether a batch has as many images as a round of all tasks.
    """

    base: str
    heads: bool = False
    large_batches: bool = False


METHODS = {
    "lora-ml": Method("lora-ml"),
    "lora-ml-heads": Method("lora-ml", heads=True),
    "last-layer-ml": Method("last-layer-ml", heads=True),
    "standard": Method("standard"),
    "standard-equal-steps": Method("standard", large_batches=True),
    "reptile": Method("reptile"),
}
WITH_TASKS = ("lora-ml", "lora-ml-heads", "last-layer-ml")
LOW_RANK = "low-rank"
INPUTS = ("none", "views", LOW_RANK, "patches")
PAIRS = ("consistent", "all")
Point = tuple[str, str, float]  # pairs, inputs and share of flipped labels: the dials

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cifar10": {
        "epochs": 10,
        "weight_decay": 1e-5,
        "finetune_epochs": 30,
        "shots": (10, 30, 100),
        "rank": 4,
        "distortion_rank": 4,
        "distortion_strength": 30.0,
        "train_per_class": 450,
        "held_out_per_class": 200,
        "reptile_inner_lr": 1e-3,
        "reptile_inner_steps": 10,
        "seeds": 5,
    },
    "digits": {
        "epochs": 20,
        "weight_decay": 1e-5,
        "finetune_epochs": 30,
        "shots": (4, 10, 30),
        "rank": 1,
        "distortion_rank": 1,
        "distortion_strength": 30.0,
        "train_per_class": 72,
        "held_out_per_class": 36,
        "reptile_inner_lr": 3e-3,
        "reptile_inner_steps": 6,
        "seeds": 3,
    },
}
# Those of CIFAR-10 were chosen on validation tasks (docs/conflict.md), but for Reptile and for
# standard-equal-steps, whose rate is that of standard. Reptile's rate is the outer one.
OF_METHODS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "cifar10": {
        "lr": {**dict.fromkeys(METHODS, 3e-3), "last-layer-ml": 1e-2, "reptile": 0.5},
        "batch_size": {**dict.fromkeys(METHODS, 4), "standard": 16, "reptile": 32},
    },
    "digits": {
        "lr": {**dict.fromkeys(METHODS, 1e-2), "standard": 3e-3, "reptile": 0.5},
        "batch_size": dict.fromkeys(METHODS, 24),
    },
}
SMOKE = {
    "epochs": 1,
    "finetune_epochs": 2,
    "seeds": 2,
    "shots": (4,),
    "train_per_class": 8,
    "held_out_per_class": 8,
    "reptile_inner_steps": 1,
}
IMAGES = {"cifar10": "cifar10-16", "digits": "digits"}  # as the vision experiment calls them
MODELS = {name: dataclasses.replace(vision.MODELS[of], dropout=0.0) for name, of in IMAGES.items()}
AUGMENTATIONS = {name: vision.AUGMENTATIONS[of] for name, of in IMAGES.items()}


@dataclasses.dataclass(frozen=True)
class ConflictSettings(RetrainingSettings):
    """Settings of one run; None stands for the data set's default."""

    command: ClassVar[str] = "conflict"
    methods: ClassVar[tuple[str, ...]] = tuple(METHODS)
    measures_afterwards: ClassVar[bool] = True
    # The method standard-equal-steps stands for equal_steps, which would add to it.
    without: ClassVar[tuple[str, ...]] = ("retrained", "evaluate_every", "equal_steps")
    zero: ClassVar[tuple[str, ...]] = (*RetrainingSettings.zero, "flipped")

    data: str = option("cifar10", help="the images", choices=tuple(DEFAULTS))
    data_root: Path = option(Path("data"), help="where CIFAR-10 is", run_only=True)
    download: bool = option(False, help="have torchvision download CIFAR-10", run_only=True)
    retrain: tuple[str, ...] = option(
        (ALL,), help="retraining methods", choices=(*METHODS, ALL), extends=True
    )
    pairs: tuple[str, ...] = option(
        PAIRS,
        extends=True,
        help="of classes to retrain on: 16 in which a class always has the same label (consistent),"
        " or all 28, in which most classes have label 0 in some and 1 in others",
        choices=PAIRS,
    )
    inputs: tuple[str, ...] = option(
        ("none", "views"),
        extends=True,
        help="what changes the inputs of each task: nothing; quarter turns, order of channels and "
        "inversion; a map of low rank of each patch; another order of the patches",
        choices=INPUTS,
    )
    flipped: tuple[float, ...] = option(
        (0.5, 0.0, 0.25),
        extends=True,
        help="share of the tasks whose two labels are exchanged, 0 to 0.5",
    )
    distortion_rank: int = option(
        None, help="of the map of low rank, I + strength U Uᵀ (cifar10: 4, digits: 1)"
    )
    distortion_strength: float = option(None, help="of the map of low rank (30)")
    shots: tuple[int, ...] = option(
        None,
        extends=True,
        help="images of an unseen task to fine-tune on (cifar10: 10 30 100, digits: 4 10 30)",
    )
    draws: int = option(3, help="few-shot draws of each unseen task in a trial")
    validation_draws: int = option(
        1, help="few-shot draws of each validation task, by which fine-tuning rates are chosen"
    )
    tune: bool = option(
        False,
        help="measure on validation tasks only, every method with each --lr and --batch-size, to "
        "choose these",
    )
    epochs: int = option(None, help="of retraining (cifar10: 10, digits: 20)")
    batch_size: tuple[int, ...] = option(
        None,
        extends=True,
        help="of a task's batch; standard: of all tasks together; one for all methods, or one for "
        "each of --retrain; with --tune the candidates (cifar10: 4, standard 16, reptile "
        "32; digits: 24)",
    )
    lr: tuple[float, ...] = option(
        None,
        extends=True,
        help="of retraining, the outer one of Reptile: one for all methods, or one for each of "
        "--retrain; with --tune the candidates (cifar10: 3e-3, last-layer-ml 1e-2; digits: "
        "1e-2, standard 3e-3; reptile: 0.5)",
    )
    weight_decay: float = option(None, help="of all optimisers but inner ones (1e-5)")
    finetune_epochs: int = option(None, help="of fine-tuning (30)")
    finetune_batch_size: int = option(128, help="of a task's batch in fine-tuning")
    lora_rates: tuple[float, ...] = option(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), help="rates of fine-tuning with LoRA to choose from"
    )
    last_layer_rates: tuple[float, ...] = option(
        (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
        help="rates of fine-tuning of the last layer to choose from",
    )
    rank: int = option(
        None, help="of LoRA, on every linear layer, with scale 1 (cifar10: 4, digits: 1)"
    )
    reptile_inner_lr: float = option(
        None, help="of the inner Adam (cifar10: 1e-3, digits: 3e-3); the outer steps are SGD's"
    )
    reptile_inner_steps: int = option(None, help="(cifar10: 10, digits: 6)")
    train_per_class: int = option(None, help="images of each class that a retraining task has")
    held_out_per_class: int = option(
        None, help="held-out images of each class at most, for choices and for reports each"
    )

    def __post_init__(self) -> None:
        for name in ("pairs", "inputs", "flipped", "shots", "lora_rates", "last_layer_rates"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, unique(getattr(self, name)))
        super().__post_init__()
        for share in self.flipped:
            if share > 0.5:
                raise ValueError(
                    f"argument --flipped: must be from 0 to 0.5, got {share}; with more than half "
                    f"of the tasks flipped, the others are the exception: use {1 - share:g}"
                )
        for shots in self.shots or ():
            if shots < 2:
                raise ValueError(
                    f"argument --shots: must be at least 2, an image of each class, got {shots}"
                )

    def kinds(self) -> set[str]:
        """Returns the methods, fine-tunings, data and changes of inputs of this run."""
        return {*self.retrain, *self.finetune, *self.refitted(PART_OF), self.data, *self.inputs}

    def points(self) -> list[Point]:
        """Returns all settings of the dials."""
        return [(*dials, flipped) for flipped in self.flipped for dials in self.panels()]

    def panels(self) -> list[tuple[str, str]]:
        """Returns the pairs and changes of inputs over which labels are flipped."""
        return [(pairs, inputs) for pairs in self.pairs for inputs in self.inputs]

    def candidates(self) -> list[ConflictSettings]:
        """Returns the settings to retrain with: these or, to tune, one for each rate and batch."""
        if not self.tune:
            return [self]
        return [
            dataclasses.replace(self, lr=(lr,), batch_size=(batch_size,))
            for batch_size in self.batch_size
            for lr in self.lr
        ]

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        chosen = {}
        for name, of_methods in OF_METHODS[self.data].items():
            given = getattr(self, name)
            several = given is not None and len(given) not in (1, len(self.retrain))
            if several and not self.tune:
                raise ValueError(
                    f"argument {flag_of(name)}: must be one value, or one for each of the "
                    f"{len(self.retrain)} methods of --retrain, got {len(given)}"
                )
            chosen[name] = tuple(of_methods[method] for method in self.retrain)
        return {**DEFAULTS[self.data], **chosen, **(SMOKE if self.smoke else {})}

    def of(self, method: str) -> dict[str, Any]:
        """Returns a method's own settings, one value each."""
        found = {}
        for name in OF_METHODS[self.data]:
            given = getattr(self, name)
            values = given * len(self.retrain) if len(given) == 1 else given
            found[name] = values[self.retrain.index(method)]
        return found


# Settings that only some methods, fine-tunings, data or inputs have a use for.
PART_OF = part_of(
    ConflictSettings,
    {
        **dict.fromkeys(("data_root", "download"), ("cifar10",)),
        **dict.fromkeys(("distortion_rank", "distortion_strength"), (LOW_RANK,)),
        **dict.fromkeys(PER_TASK, WITH_TASKS),
        "standard_order": ("standard", "standard-equal-steps"),
        "lr": tuple(METHODS),
        "shared_head": ("lora-ml-heads", "last-layer-ml"),
        "rank": ("lora-ml", "lora-ml-heads", "lora"),
        "lora_rates": ("lora",),
        "last_layer_rates": ("last-layer",),
    },
)
