"""Settings of the text experiment."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from experiments.lib.cli import option, unique
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
SCRATCH, BYTES = "scratch", "bytes"

# What stands for None.
DEFAULTS: Mapping[str, Any] = {
    "tasks": (),
    "validation_tasks": (),
    "test_tasks": (),
    "amounts": (1.0, 4.0, 16.0),
    "hidden": 256,
    "layers": 3,
    "length": 256,
    "train_kb": 64,
    "epochs": 2,
    "finetune_steps": 30,
    "seeds": 3,
}
SMOKE: Mapping[str, Any] = {
    "amounts": (0.2,),
    "hidden": 16,
    "layers": 1,
    "length": 32,
    "train_kb": 1,
    "epochs": 1,
    "finetune_steps": 2,
    "seeds": 2,
}


@dataclasses.dataclass(frozen=True)
class TextSettings(RetrainingSettings):
    """Settings of one run; None stands for a default that ``--smoke`` changes."""

    command: ClassVar[str] = "text"
    methods: ClassVar[tuple[str, ...]] = METHODS
    zero: ClassVar[tuple[str, ...]] = (*ZERO, "data_seed", "dropout", "warmup")
    measures_afterwards: ClassVar[bool] = True
    # The decoder is called alone and would not be compiled.
    without: ClassVar[tuple[str, ...]] = ("retrained", "evaluate_every", "shared_head", "compile")

    data: Path | None = option(
        None,
        help="a folder that has a folder per task with *.txt, or *.jsonl of prompt and response; "
        "--smoke makes some up without",
        run_only=True,
    )
    tasks: tuple[str, ...] = option(
        None, help="folders of the retraining tasks (default: all that are not named below)"
    )
    validation_tasks: tuple[str, ...] = option(
        None, help="folders of the unseen tasks by which learning rates are chosen"
    )
    test_tasks: tuple[str, ...] = option(None, help="folders of the unseen tasks to report on")
    data_seed: int = option(0, help="seed of the order of files, which is that of all trials")
    train_kb: int = option(None, help="kB of text of each retraining task at most (default: 64)")
    amounts: tuple[float, ...] = option(
        None, extends=True, help="kB of text of an unseen task to adapt to (default: 1 4 16)"
    )
    model: str = option(
        SCRATCH, help="name or folder of a causal language model; scratch: a random Llama"
    )
    tokenizer: str | None = option(
        None, help="its name or folder, or bytes (default: the model's; scratch: bytes)"
    )
    hidden: int = option(None, help="scratch: features of a token, a multiple of 64 (default: 256)")
    layers: int = option(None, help="scratch: number of layers (default: 3)")
    length: int = option(None, help="tokens of a sequence at most (default: 256)")
    mean_over: str = option(
        "tokens",
        help="a task's loss is the mean over its tokens, or over the means of its sequences",
        choices=("tokens", "samples"),
    )
    retrain: tuple[str, ...] = option(
        (ALL,),
        help="retraining methods; none: adapt right away",
        choices=(*METHODS, ALL),
        extends=True,
    )
    finetune_head: str = option(
        "retrained",
        help="where the last layer of the unseen tasks starts",
        choices=("fresh", "retrained"),
    )
    tune: bool = option(
        False, help="measure on validation tasks only, to choose learning rates of retraining by"
    )
    rank: int = option(8, help="of LoRA, on every linear layer but the output layer")
    alpha: float = option(16.0, help="the scale of LoRA is alpha / rank")
    dropout: float = option(0.0, help="dropout on the inputs of LoRA")
    epochs: int = option(None, help="of retraining (default: 2)")
    batch_size: int = option(1, help="sequences of a task's batch; standard: of all tasks together")
    lr: float = option(2e-3, help="of retraining")
    warmup: float = option(0.05, help="part of a training in which the rate rises")
    weight_decay: float = option(0.01, help="of AdamW, inner steps of Reptile excepted")
    finetune_steps: int = option(
        None, help="steps of an adaptation: the whole epochs that come nearest (default: 30)"
    )
    finetune_batch_size: int = option(4, help="sequences per task")
    lora_rates: tuple[float, ...] = option(
        (2e-3, 6e-3, 2e-2), help="learning rates of adapting with LoRA to choose from"
    )
    last_layer_rates: tuple[float, ...] = option(
        (2e-3, 6e-3, 2e-2), help="learning rates of adapting the last layer to choose from"
    )
    reptile_lr: float = option(0.5, help="outer: how far the weights go to a task's solution")
    reptile_inner_lr: float = option(1e-3, help="of the inner AdamW")
    reptile_inner_steps: int = option(8, help="per task and outer step")
    packed: bool | None = option(
        None, help="run sequences one behind the other, without padding (default: where it works)"
    )
    max_tokens: int = option(
        None, help="of one pass; larger batches take several (CPU: 8192, GPU: 32768)"
    )

    def __post_init__(self) -> None:
        for name in (
            *("tasks", "validation_tasks", "test_tasks"),
            *("amounts", "lora_rates", "last_layer_rates"),
        ):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, unique(getattr(self, name)))
        super().__post_init__()
        if self.dropout >= 1:
            raise ValueError(f"argument --dropout: must be below 1, got {self.dropout}")
        if self.warmup > 1:
            raise ValueError(f"argument --warmup: must be a part, at most 1, got {self.warmup}")
        if self.length is not None and self.length < 2:
            raise ValueError(f"argument --length: must be at least 2, got {self.length}")

    def defaults(self, device_type: str) -> Mapping[str, Any]:
        max_tokens = 8192 if device_type == "cpu" else 32768
        return {**DEFAULTS, **(SMOKE if self.smoke else {}), "max_tokens": max_tokens}

    @property
    def held_out_kb(self) -> int:
        """Returns how much text of each task there is for measurements, in kB."""
        return 1 if self.smoke else 8

    @property
    def written_tokens(self) -> int:
        """Returns how many tokens a model writes after adapting to the most text."""
        return 8 if self.smoke else 160

    def kinds(self) -> set[str]:
        """Returns the methods, fine-tunings and model of this run."""
        return {*self.retrain, *self.finetune, self.model}


# Settings that only some methods, fine-tunings or models have a use for.
PART_OF = part_of(
    TextSettings,
    {
        **dict.fromkeys(("hidden", "layers"), (SCRATCH,)),
        **dict.fromkeys(("rank", "alpha", "dropout"), ("lora-ml", "lora")),
        **dict.fromkeys(("epochs", "batch_size", "train_kb"), RETRAINED),
        **dict.fromkeys(("amounts", "validation_tasks", "test_tasks"), FINETUNES),
        "lr": (*WITH_TASKS, "standard"),
        "finetune_head": ("last-layer",),
        "lora_rates": ("lora",),
        "last_layer_rates": ("last-layer",),
    },
)
