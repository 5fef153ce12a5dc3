"""Settings of the ratings experiment.

What stands in `CHOSEN` and `FINETUNED`, and Reptile's learning rates, was found by ``python -m
experiments.ratings.choose --seeds 3`` on the validation users, who are the same in every trial and
no test users of any. ``--users validation`` evaluates any other setting on the validation users.

Other learning rates, epochs, batches and the network's size are not in the grids. They come from
some forty settings tried by hand on the validation users of trial 0, most with
``weighting="users"``: 60 epochs for 20, 100 and 200 steps of fine-tuning for 30, and embeddings of
8 and 32 for 16 were not better by more than about 0.002.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from experiments.lib.cli import flag_of, option, unique
from experiments.lib.retraining_settings import (
    ALL,
    FINETUNES,
    METHODS,
    NONE,
    WITH_TASKS,
    ZERO,
    RetrainingSettings,
    part_of,
)

BASELINES = ("global-mean", "biases", "factors")
USER_BIAS = "user-bias"  # beside the fine-tunings, a bias per user in closed form
SHOT_POOL = 50  # ratings of an unseen user that shots are drawn from, at most; others are held out
VALIDATION_SHARE = 0.1  # part of a retraining user's ratings that the epoch is chosen by
REPTILE_BATCHES = 4  # of an epoch of Reptile

# What stands for None in the retrainings, by method.
CHOSEN: Mapping[str, Mapping[str, Any]] = {
    "standard": {"weight_decay": 0.8},
    "lora-ml": {"weight_decay": 0.05, "adapter_weight_decay": 0.1},
    "last-layer-ml": {"weight_decay": 0.4, "adapter_weight_decay": 0.1},
    "reptile": {"weight_decay": 0.6},
}
# What stands for None in the fine-tunings, by method and fine-tuning.
FINETUNED: Mapping[tuple[str, str], float] = {
    ("standard", "lora"): 4.0,
    ("standard", "last-layer"): 10.0,
    ("lora-ml", "lora"): 8.0,
    ("lora-ml", "last-layer"): 40.0,
    ("last-layer-ml", "lora"): 4.0,
    ("last-layer-ml", "last-layer"): 20.0,
    ("reptile", "lora"): 4.0,
    ("reptile", "last-layer"): 20.0,
}
DEFAULTS: Mapping[str, Any] = {
    "seeds": 10,
    "tasks": (640,),
    "validation_users": 100,
    "test_users": 203,
    "shots": (1, 2, 5, 10, 20, 50),
    "epochs": 20,
    "finetune_epochs": 30,
    "reptile_epochs": 8,
}
SMOKE: Mapping[str, Any] = {
    "seeds": 2,
    "tasks": (24,),
    "validation_users": 8,
    "test_users": 10,
    "shots": (2, 5),
    "epochs": 2,
    "finetune_epochs": 3,
    "reptile_epochs": 1,
}


@dataclasses.dataclass(frozen=True)
class RatingsSettings(RetrainingSettings):
    """Settings of one run; None stands for what was chosen for the method, or for ``--smoke``.

    Retraining minimises, for T users with N ratings, and so with N / T of each on average,

        T / N Σ_n error_n(W, θ)² + weight_decay / 2 |W|² + adapter_weight_decay / 2 Σ_t |θ_t|²,

    standard retraining without θ_t. Dividing by T gives the mean over ratings that is trained, with
    decays of 1 / T of these: they mean the same for any T. With ``weighting="users"`` the first
    term is Σ_t L_t, the sum of each user's mean squared error. The decay of fine-tuning is that of
    the sum of a user's squared errors, whatever the number of shots.
    """

    command: ClassVar[str] = "ratings"
    measures_afterwards: ClassVar[bool] = True
    without: ClassVar[tuple[str, ...]] = ("equal_steps", "evaluate_every")
    zero: ClassVar[tuple[str, ...]] = (*ZERO, "rank", "finetune_weight_decay")

    data_root: Path | None = option(
        None,
        help="ml-100k.inter, u.data, recbole's wheel, or the folder of one; --smoke makes ratings "
        "up without",
        run_only=True,
    )
    users: str = option(
        "test",
        help="the unseen users to fine-tune for: the test users, or those that choices are made by",
        choices=("test", "validation"),
    )
    baselines: tuple[str, ...] = option(
        (ALL,), help="of recommender systems", choices=(*BASELINES, ALL, NONE), extends=True
    )
    tasks: tuple[int, ...] = option(
        None,
        help="retraining users; several numbers are run one by one (default: 640)",
        extends=True,
    )
    validation_users: int = option(None, help="the same in every trial (default: 100)")
    test_users: int = option(None, help="unseen users (default: 203)")
    shots: tuple[int, ...] = option(
        None,
        help="ratings of an unseen user to fine-tune on (default: 1 2 5 10 20 50)",
        extends=True,
    )
    held_out: int = option(
        10,
        help="ratings of an unseen user that are held out, at least; a user without so many "
        "beside the shots is left out",
    )
    list_users: bool = option(
        False, help="list the unseen users who have too few ratings", run_only=True
    )
    embedding: int = option(16, help="size of an item's embedding")
    hidden: int = option(32, help="size of the hidden layer")
    rank: tuple[int, ...] = option(
        (2,),
        help="of LoRA, on both linear layers; several are run one by one; 0: no adapters",
        extends=True,
    )
    order: str = option(
        "proportional",
        help="lora-ml, last-layer-ml, reptile: batches of every user in proportion to the number "
        "of ratings, or of as many ratings of each user as there are left",
        choices=("proportional", "rounds"),
    )
    weighting: str = option(
        "ratings",
        help="lora-ml, last-layer-ml: a batch's loss is the mean over its ratings, or over its "
        "users of the mean over each one's ratings (users)",
        choices=("ratings", "users"),
    )
    epochs: int = option(None, help="of retraining (default: 20)")
    batches: int = option(16, help="of an epoch, whatever the number of users")
    lr: float = option(1e-2, help="of retraining")
    weight_decay: float | None = option(
        None, help="of the shared weights (default: chosen for each method)"
    )
    finetune_epochs: int = option(None, help="steps of fine-tuning (default: 30)")
    finetune_lr: float = option(2e-2, help="of fine-tuning")
    finetune_weight_decay: float | None = option(
        None, help="of a user's adapters or head (default: chosen for each method)"
    )
    decays_from: Path | None = option(
        None,
        help="take the decays of each number of users and rank from this finished run of "
        "experiments.ratings.choose, instead of those chosen for 640 users and rank 2",
    )
    finetune_head: str = option(
        "retrained",
        help="where the test users' heads start: anew, or from the retrained head, of which a "
        "user's own head is a deviation",
        choices=("fresh", "retrained"),
    )
    reptile_epochs: int = option(None, help="(default: 8)")
    reptile_optimizer: str = option("sgd", help="outer", choices=("adam", "sgd"))
    reptile_lr: float = option(0.03, help="outer")
    reptile_inner_lr: float = option(3e-2, help="of the inner Adam")
    reptile_inner_steps: int = option(4, help="per user and outer step")

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.baselines
        if NONE in given and len(given) > 1:
            raise ValueError(f"argument --baselines: none stands alone, got {' '.join(given)}")
        chosen = BASELINES if ALL in given else () if NONE in given else unique(given)
        object.__setattr__(self, "baselines", chosen)
        for name in ("tasks", "shots", "rank"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, unique(getattr(self, name)))
        for shots in self.shots or ():
            if shots > SHOT_POOL:
                raise ValueError(f"argument --shots: must be at most {SHOT_POOL}, got {shots}")

    @property
    def batch_size(self) -> int:
        """Returns a placeholder: `Trials.loader` counts the batches of a retraining instead."""
        return 1

    @property
    def finetune_batch_size(self) -> int:
        """Returns the ratings of a user in a step of fine-tuning: all that there are."""
        return SHOT_POOL

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        if self.decays_from is not None:
            for name in ("weight_decay", "adapter_weight_decay", "finetune_weight_decay"):
                if getattr(self, name) is not None:
                    raise ValueError(f"argument {flag_of(name)}: contradicts --decays-from")
        return SMOKE if self.smoke else DEFAULTS

    def kinds(self) -> set[str]:
        """Returns the methods and fine-tunings of this run."""
        return {*self.retrain, *self.finetune, *self.refitted(PART_OF), *self.baselines}

    def ranks(self, kind: str) -> tuple[int | None, ...]:
        """Returns the ranks to run a method or fine-tuning with; None: it has no adapters."""
        return self.rank if kind in ("lora-ml", "lora") else (None,)

    def of_method(self, method: str, tasks: int, chosen: Mapping[str, Any]) -> RatingsSettings:
        """Returns these settings with what was chosen for a method, for so many users.

        What is given stands before what was chosen.
        """
        missing: dict[str, Any] = {
            name: value
            for name, value in chosen.items()
            if getattr(self, name) is None or self.decays_from is not None
        }
        if method == "reptile":
            missing["batches"] = REPTILE_BATCHES
        filled = dataclasses.replace(self, **missing)
        assert filled.weight_decay is not None
        shared, own = filled.weight_decay / tasks, filled.adapter_weight_decay
        return dataclasses.replace(
            filled,
            weight_decay=shared,
            adapter_weight_decay=None if own is None else own / tasks,
            finetune_weight_decay=shared,  # of a shared head, where it is refitted
        )

    def of_finetune(self, chosen: float, users: int, shots: int) -> RatingsSettings:
        """Returns these settings with the decay chosen for a fine-tuning on some shots."""
        decay = self.finetune_weight_decay
        if decay is None:
            decay = chosen
        return dataclasses.replace(self, finetune_weight_decay=decay / shots / users)


# Settings that only some methods, fine-tunings or baselines have a use for; the others are for all.
PART_OF = part_of(
    RatingsSettings,
    {
        "order": (*WITH_TASKS, "reptile"),
        "weighting": WITH_TASKS,
        "shared_head": ("last-layer-ml",),
        "rank": ("lora-ml", "lora"),
        "finetune_head": ("last-layer",),
        "weight_decay": METHODS,
        "finetune_weight_decay": FINETUNES,  # a shared head is refitted with weight_decay
        **dict.fromkeys(("epochs", "batches"), (*WITH_TASKS, "standard")),
    },
)
