"""Settings that the experiments with PyTorch models share: vision and language."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from experiments.lib.cli import MOST_TRIALS, check_values, flag_of, option, unique
from experiments.lib.experiment import RunSettings
from experiments.lib.processes import count, launched
from metalora.meta.distribution import PARALLEL
from metalora.meta.precision import MATMUL_PRECISIONS

Resolved = TypeVar("Resolved", bound="RetrainingSettings")

METHODS = ("lora-ml", "last-layer-ml", "standard", "reptile")
WITH_TASKS = METHODS[:2]  # the methods whose tasks have adapters or heads of their own
FINETUNES = ("lora", "last-layer")
REFIT = "refit"  # of a shared head, configured as fine-tuning of the last layer is
ALL, NONE = "all", "none"
PER_TASK = ("step_per", "adapter_lr", "adapter_weight_decay", "adapter_steps")
ZERO = ("first_seed", "weight_decay", "adapter_weight_decay")  # these may be zero
# Settings that only some methods or fine-tunings have a use for; the others are for all.
PART_OF: Mapping[str, tuple[str, ...]] = {
    "lr": (*WITH_TASKS, "standard"),
    **dict.fromkeys(PER_TASK, WITH_TASKS),
    **dict.fromkeys(("standard_order", "equal_steps"), ("standard",)),
    "evaluate_every": FINETUNES,
}


@dataclasses.dataclass(frozen=True)
class RetrainingSettings(RunSettings):
    """Settings of a run that retrains by several methods and fine-tunes on unseen tasks.

    Of ``finetune`` and ``retrain``, "all" and "none" stand for lists, which replace them.
    None stands for a default that depends on the data, the device or ``--smoke``; `resolved`
    fills it in. The default of ``step_per`` follows one rule, as every experiment does what its
    authors' runs did: an optimiser step per round of all tasks in vision (the objective of eq. 5),
    per task in language.
    """

    command: ClassVar[str]
    methods: ClassVar[tuple[str, ...]] = METHODS
    zero: ClassVar[tuple[str, ...]] = ZERO
    without: ClassVar[tuple[str, ...]] = ()  # fields that the experiment has no use for
    # Whether it measures after a fine-tuning, when a process has only its own tasks' adapters.
    measures_afterwards: ClassVar[bool] = False

    retrain: tuple[str, ...] = option(
        (ALL,), help="retraining methods", choices=(*METHODS, ALL), extends=True
    )
    finetune: tuple[str, ...] = option(
        (ALL,),
        help="fine-tunings; none: only retrain",
        choices=(*FINETUNES, ALL, NONE),
        extends=True,
    )
    seeds: int = option(None, help="trials, each with seeds of its own (default: 5)", extends=True)
    first_seed: int = option(0, help="seed of the first trial; the others follow")
    step_per: str = option(
        "round",
        help="lora-ml, last-layer-ml: an optimiser step per round of all tasks, or per task",
        choices=("round", "task"),
    )
    adapter_lr: float | None = option(
        None, help="rate of the tasks' adapters and heads in retraining (default: --lr)"
    )
    adapter_weight_decay: float | None = option(
        None,
        help="decay of the tasks' adapters and heads in retraining (default: --weight-decay)",
    )
    adapter_steps: int = option(
        1,
        help="lora-ml, last-layer-ml: steps on adapters and heads alone before each step on the "
        "shared weights; 1: both in one step",
    )
    standard_order: str = option(
        "pooled",
        help="standard: batches drawn from all tasks together, or of one task each, task after "
        "task in turn (interleaved) or, as in the authors' language runs, in blocks",
        choices=("pooled", "interleaved", "blocked"),
    )
    equal_steps: bool = option(
        False,
        help="standard: larger batches, so that it takes as many optimiser steps as lora-ml and "
        "last-layer-ml",
    )
    retrained: tuple[Path, ...] = option(
        (),
        help="only fine-tune: take the retrained models from the runs in these folders, each from "
        "the first that has retrained it with the same settings",
        run_only=True,
    )
    shared_head: str = option(
        "mean",
        help="after a retraining with a head per task: the head left behind is the mean of the "
        "tasks' heads, or refitted to the retraining tasks without adapters, as long as a "
        "fine-tuning",
        choices=("mean", "refit"),
    )
    finetune_head: str = option(
        "fresh",
        help="where the test tasks' heads start: anew, or from the retrained head (--shared-head); "
        "a head that LoRA adapts is always the retrained one",
        choices=("fresh", "retrained"),
    )
    evaluate_every: int = option(
        1,
        help="measure held-out accuracy after every so many epochs of fine-tuning only, and after "
        "the last; above 1 no best epoch is reported",
    )
    device: str = option("auto", help="auto, cpu, cuda, ...", run_only=True)
    precision: str = option(
        "auto",
        help="auto is fp32 on a CPU, bf16 on a GPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    matmul_precision: str = option(
        "default",
        help="products of float32 matrices: as torch is set; in float32, on a CPU by its faster "
        "library (ieee); or with factors rounded to TF32 or bfloat16 where the device can",
        choices=MATMUL_PRECISIONS,
    )
    compile: bool = option(False, help="torch.compile the model; needs a C++ compiler")
    parallel: str | None = option(
        None,
        help="what the processes of torchrun share: the samples of every task (data, the default "
        "there), or the tasks, each of which one process trains",
        choices=PARALLEL,
        run_only=True,
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.name in self.without and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"argument {flag_of(field.name)}: the {self.command} experiment has no use "
                    "for it; leave it out"
                )
        for name, every in (("retrain", self.methods), ("finetune", FINETUNES)):
            chosen = getattr(self, name)
            object.__setattr__(self, name, every if ALL in chosen else unique(chosen))
        if NONE in self.finetune:
            if len(self.finetune) > 1:
                given = " ".join(self.finetune)
                raise ValueError(f"argument --finetune: none stands alone, got {given}")
            object.__setattr__(self, "finetune", ())
        tasks_apart = self.parallel == "tasks" and count() > 1
        if tasks_apart and self.finetune and self.measures_afterwards:
            raise ValueError(
                f"argument --parallel: must be data, got tasks; after a fine-tuning the "
                f"{self.command} experiment measures every task in each process"
            )
        if self.retrained and not self.finetune:
            raise ValueError("argument --retrained: with --finetune none there is nothing to do")
        check_values(self.command, self, zero=self.zero, most={"seeds": MOST_TRIALS})

    def refits(self, method: str, part_of: Mapping[str, Sequence[str]]) -> bool:
        """Returns whether the shared head that a method leaves is refitted; see `part_of`."""
        return self.shared_head == REFIT and method in part_of["shared_head"]

    def refitted(self, part_of: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
        """Returns `REFIT` if a method of this run is refitted: a kind that `part_of` knows."""
        return (REFIT,) if any(self.refits(m, part_of) for m in self.retrain) else ()

    @property
    def trials(self) -> range:
        """Returns the seeds of the trials."""
        return range(self.first_seed, self.first_seed + self.seeds)

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        """Returns what stands for None, by field."""
        raise NotImplementedError

    def resolved(self: Resolved, device_type: str) -> Resolved:
        """Returns these settings with every default filled in."""
        defaults = self.defaults(device_type)
        missing = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        if self.parallel is None and launched():
            missing["parallel"] = "data"
        if self.precision == "auto":
            missing["precision"] = "fp32" if device_type == "cpu" else "bf16"
        return dataclasses.replace(self, **missing)


def part_of(
    settings: type[RetrainingSettings], own: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Returns which methods and the like each field is for: shared fields, ``own``, and by prefix.

    Fields that begin with "reptile" are for Reptile, those that begin with "finetune" for the
    fine-tunings and, but for the head that these begin with, for refitting a shared head.
    """
    names = [field.name for field in dataclasses.fields(settings)]
    of_reptile = {n: ("reptile",) for n in names if n.startswith("reptile")}
    as_long = FINETUNES if "shared_head" in settings.without else (*FINETUNES, REFIT)
    of_finetuning = {n: as_long for n in names if n.startswith("finetune_")}
    return {**PART_OF, **of_reptile, **of_finetuning, "finetune_head": FINETUNES, **own}
