"""The settings of a training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from metalora._checks import (
    check_choice,
    check_count,
    check_nonnegative,
    check_positive,
    check_probability,
)
from metalora.meta.distribution import PARALLEL
from metalora.meta.optimizer import NAMED
from metalora.meta.precision import MATMUL_PRECISIONS


@dataclass(frozen=True)
class TrainConfig:
    """Settings of the training loop.

    Attributes:
        epochs: passes over the data.
        lr: learning rate, before the schedule.
        weight_decay: as the optimiser means it.
        adapter_lr: learning rate of adapters and heads, before the schedule; None means ``lr``.
            A model without any has no use for it.
        adapter_weight_decay: weight decay of adapters and heads; None means ``weight_decay``.
        adapter_steps: optimiser steps on adapters and heads for each step on the shared weights. 1
            takes both in one step, from one gradient. k > 1 takes k steps on the adapters and heads
            alone, all on the same batch, and then one on the shared weights alone, as the paper's
            algorithm for the linear model does with k = 10. Schedules count the shared steps.
        optimizer: "adam", "adamw" or "sgd".
        schedule: "constant", "cosine" (to zero) or "linear" (to zero).
        schedule_unit: whether the rate changes with every "epoch" or optimiser "step".
        warmup: part of the training, 0 to 1, over which the rate rises linearly first. It is a part
            of the epochs, or with ``schedule_unit="step"`` of all optimiser steps; a longer
            schedule (``schedule_scale``) does not change it.
        warmup_steps: the same in optimiser steps, instead of ``warmup``; needs
            ``schedule_unit="step"``.
        schedule_scale: the schedule is this many times as long as the training, so that above 1
            the rate never decays to zero.
        grad_clip: largest norm of the loss gradient; None does not clip.
        precision: "fp32" computes in the parameters' dtype; "bf16" and "fp16" use autocast, fp16
            with gradient scaling.
        matmul_precision: of torch's float32 products while it trains and validates: "default" (as
            torch is set), "ieee", "tf32" or "bf16", see `metalora.meta.matmul_precision`.
        step_per: one optimiser step per "round" of all tasks, the PEFT-ML objective, or per "task".
        seed: with the epoch's number, determines all random numbers.
        compile: whether ``torch.compile`` compiles the model for the training, once for training
            and once for evaluation, whatever the sizes of the batches and the tasks in them, and
            again only where a layer has so few or so many rows that its route changes (see
            `metalora.ops.lora_linear_route`). Needs a C++ compiler, on a GPU triton. Results are
            those without up to rounding, but dropout draws other random numbers.
        parallel: how the processes of torch.distributed share the training: "data", each has a part
            of every task's samples, or "tasks", each has some of the tasks, see
            `metalora.meta.Distribution`. Results are up to rounding the same for any number of
            processes, one included. They are those of None, which means one process by itself, but
            dropout draws other random numbers: the mask of a sample depends on its place in the
            whole batch, not on the process.
        betas, eps: of Adam and AdamW.
        momentum: of SGD.

    Raises:
        TypeError: if a field has a wrong type.
        ValueError: if a field is outside its range.
    """

    epochs: int
    lr: float
    weight_decay: float = 0.0
    optimizer: str = "adam"
    schedule: str = "constant"
    schedule_unit: str = "epoch"
    warmup: float = 0.0
    warmup_steps: int | None = None
    schedule_scale: float = 1.0
    grad_clip: float | None = None
    precision: str = "fp32"
    step_per: str = "round"
    seed: int = 0
    adapter_lr: float | None = None
    adapter_weight_decay: float | None = None
    adapter_steps: int = 1
    matmul_precision: str = "default"
    compile: bool = False
    parallel: str | None = None
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.0

    def __post_init__(self) -> None:
        self._check("epochs", check_count)
        self._check("lr", check_positive)
        self._check("weight_decay", check_nonnegative)
        self._check("adapter_lr", check_positive)
        self._check("adapter_weight_decay", check_nonnegative)
        self._check("adapter_steps", check_count)
        check_choice("TrainConfig", "optimizer", self.optimizer, NAMED)
        self._check_optimizer_settings()
        check_choice("TrainConfig", "schedule", self.schedule, ("constant", "cosine", "linear"))
        check_choice("TrainConfig", "schedule_unit", self.schedule_unit, ("epoch", "step"))
        self._check("warmup", check_nonnegative)
        if self.warmup > 1:
            raise ValueError(f"TrainConfig: warmup must be a fraction in 0..1, got {self.warmup}")
        self._check_warmup_steps()
        self._check("schedule_scale", check_positive)
        if self.schedule_scale < 1:
            raise ValueError(f"TrainConfig: schedule_scale must be >= 1, got {self.schedule_scale}")
        self._check("grad_clip", check_positive)
        check_choice("TrainConfig", "precision", self.precision, ("fp32", "bf16", "fp16"))
        check_choice("TrainConfig", "matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        check_choice("TrainConfig", "step_per", self.step_per, ("round", "task"))
        self._check("seed", check_count, minimum=0)
        if not isinstance(self.compile, bool):
            raise TypeError(f"TrainConfig: compile must be True or False, got {self.compile!r}")
        self._check_parallel()

    def _check(self, field: str, check: Callable[..., Any], **limits: int) -> None:
        """Keeps the plain number that ``check`` returns for a field; None stays if it may be."""
        value = getattr(self, field)
        if value is not None or getattr(type(self), field, 0) is not None:
            object.__setattr__(self, field, check("TrainConfig", field, value, **limits))

    @property
    def optimizer_settings(self) -> dict[str, Any]:
        """What the optimiser takes beside the learning rate and the weight decay."""
        if self.optimizer == "sgd":
            return {"momentum": self.momentum}
        return {"betas": self.betas, "eps": self.eps}

    def _check_optimizer_settings(self) -> None:
        if not isinstance(self.betas, Sequence) or len(self.betas) != 2:
            raise TypeError(f"TrainConfig: betas must be two numbers in [0, 1), got {self.betas!r}")
        betas = tuple(check_probability("TrainConfig", "betas", beta) for beta in self.betas)
        object.__setattr__(self, "betas", betas)
        self._check("eps", check_positive)
        self._check("momentum", check_nonnegative)
        taken = self.optimizer_settings
        for name in ("betas", "eps", "momentum"):
            given = getattr(self, name)
            if name not in taken and given != getattr(type(self), name):
                raise ValueError(
                    f"TrainConfig: optimizer {self.optimizer!r} takes {' and '.join(taken)}, "
                    f"but no {name}, got {given}; leave {name} out"
                )

    def _check_parallel(self) -> None:
        if self.parallel is None:
            return
        check_choice("TrainConfig", "parallel", self.parallel, PARALLEL)
        if self.compile:
            raise ValueError(
                "TrainConfig: compile must be False with parallel, whose dropout draws each "
                "sample's mask by itself, which is not compiled"
            )
        if self.parallel == "tasks" and self.precision == "fp16":
            raise ValueError(
                "TrainConfig: precision must be 'fp32' or 'bf16' with parallel='tasks', as each "
                "process would scale its gradients by itself, got 'fp16'"
            )

    def _check_warmup_steps(self) -> None:
        if self.warmup_steps is None:
            return
        self._check("warmup_steps", check_count, minimum=0)
        if self.warmup > 0:
            raise ValueError(
                "TrainConfig: give warmup or warmup_steps, not both, got "
                f"warmup={self.warmup} and warmup_steps={self.warmup_steps}"
            )
        if self.schedule_unit != "step":
            raise ValueError(
                "TrainConfig: warmup_steps needs schedule_unit='step', got "
                f"{self.schedule_unit!r}; give warmup as a part of the training instead"
            )
