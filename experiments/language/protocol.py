"""Retraining on some personas and fine-tuning on others (paper, section 4 and appendix E.2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.language.encoders import Encoders, head_names
from experiments.language.report import BEFORE, BEST, LAST
from experiments.language.settings import WITH_TASKS, Settings
from experiments.language.tokens import TokenizedTurns
from experiments.lib.errors import RunError
from experiments.lib.training import known, retrain, with_tasks
from metalora.adapters import LoRAConfig
from metalora.hf import (
    SequencePasses,
    Sequences,
    enable_packing,
    packing_problem,
    position_offset,
)
from metalora.meta import (
    Batch,
    Callback,
    Evaluation,
    KeepBest,
    Progress,
    Result,
    RoundLoader,
    TrainConfig,
    derive_seed,
    evaluate,
    finetune_last_layer,
    finetune_lora,
    refit_heads,
)

# Of one turn and epoch, in forward passes: the gradients of all weights cost two more, those of
# LoRA about one, and those of a last layer next to nothing.
EVALUATION, HEAD, LORA, FULL = 1.0, 1.0, 2.0, 3.0


def choice_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of "is this the true one", [B * n, 2] → the mean over candidates, [B]."""
    answers = batch.targets.to(logits.device)
    n = len(logits) // len(answers)
    truth = (torch.arange(n, device=logits.device) == answers[:, None]).long()
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(logits, truth.flatten(), reduction="none").view(-1, n).mean(1)


def choice_accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """1 for each turn whose true candidate has the highest class-1 logit, else 0; [B]."""
    chosen = logits[:, 1].view(len(batch.targets), -1).argmax(1)
    return (chosen == batch.targets.to(chosen.device)).double()


class Protocol:
    """The experiment on one device: its tasks, and what is done with them.

    Args:
        settings: resolved settings.
        retraining, validation: turns of the retraining tasks.
        test, held_out: turns of the test tasks, in the same order of tasks.
        encoders: makes the models.
        device: where to train.
    """

    def __init__(
        self,
        settings: Settings,
        retraining: TokenizedTurns,
        validation: TokenizedTurns,
        test: TokenizedTurns,
        held_out: TokenizedTurns,
        encoders: Encoders,
        device: torch.device,
    ):
        self.settings, self.encoders, self.device = settings, encoders, device
        self.retraining, self.validation = retraining, validation
        self.test, self.held_out = test, held_out
        model = encoders.new(0)
        problem = packing_problem(model) if settings.packed in (None, True) else None
        if problem is not None and settings.packed:
            raise RunError(f"--packed: {problem}; leave it out")
        self.packed = settings.packed is not False and problem is None
        self.heads = head_names(model)
        self._position_offset = position_offset(model)

    def new_model(self, seed: int) -> nn.Module:
        """The pretrained model with a new head, the same for every method of a trial."""
        model = self.encoders.new(seed).to(self.device)
        return enable_packing(model) if self.packed else model

    def retrain(
        self, method: str, rank: int | None, seed: int, *callbacks: Callback
    ) -> tuple[nn.Module, Result]:
        """A plain model after one of the four retrainings, at its best epoch on held-out data."""
        s = self.settings
        model = self.new_model(seed)
        own_seed = derive_seed("retraining", seed)
        order = s.standard_order if method == "standard" else "rounds"
        loader = self._loader(self.retraining, s.batch_size, seed=own_seed, order=order)
        config = self.retraining_config(method, own_seed)
        common = self._common(
            self.validation, Progress(f"{method}, trial {seed}"), KeepBest(), *callbacks
        )
        adapter = self._adapter(known(rank)) if method == "lora-ml" else None
        inner = {
            "inner_steps": s.reptile_inner_steps,
            "inner_lr": s.reptile_inner_lr,
            "inner_optimizer": "adamw",
        }
        result = retrain(method, model, loader, config, adapter, self.heads, inner, **common)
        if method in WITH_TASKS and s.shared_head == "refit":
            self._refit(model, method, seed)
        return model, result

    def retraining_config(self, method: str, seed: int) -> TrainConfig:
        """How a method is trained.

        The authors' schedules are given in the number of batches of the largest task, len_0, and
        the epochs E. Their warm-up of 0.1 · len_0 · E steps is 1.5 % of retraining, and their
        length of 6.67 · len_0 · E steps is the whole of it, because their ten tasks together have
        6.67 · len_0 batches. Reptile's are 0.1 · T · E and 6.67 · T · E outer steps. It takes T · E
        of them, one per task and epoch, so this is 10 % and 6.67 times its training. The settings
        are such parts, so they hold as well where a task has more batches than inner steps.
        """
        s = self.settings
        reptile = method == "reptile"
        return TrainConfig(
            epochs=known(s.epochs),
            lr=s.reptile_lr if reptile else s.lr,
            warmup=s.reptile_warmup if reptile else s.warmup,
            schedule_scale=s.reptile_schedule_scale if reptile else s.schedule_scale,
            seed=seed,
            **(with_tasks(s) if method in WITH_TASKS else {}),
            **self._common_config(),
        )

    def _refit(self, model: nn.Module, method: str, seed: int) -> None:
        """Fits the shared head to all retraining tasks, as long as a fine-tuning does."""
        own_seed = derive_seed("refitting", seed)
        size = self.settings.finetune_batch_size
        loader = self._loader(self.retraining, size, seed=own_seed, order="pooled")
        refit_heads(
            model,
            loader,
            self.finetuning_config(own_seed),
            self.heads,
            loss=choice_loss,
            callbacks=[Progress(f"{method}, shared head, trial {seed}")],
        )

    def finetuning_config(self, seed: int) -> TrainConfig:
        """How the test tasks are fine-tuned."""
        s = self.settings
        return TrainConfig(
            epochs=known(s.finetune_epochs),
            lr=s.finetune_lr,
            warmup=s.finetune_warmup,
            schedule_scale=s.finetune_schedule_scale,
            seed=seed,
            **self._common_config(),
        )

    def finetune(
        self, model: nn.Module, kind: str, rank: int | None, seed: int, *callbacks: Callback
    ) -> dict[str, list[float]]:
        """Adapts the model, in place, to all test tasks side by side, each for itself.

        The tasks share only the frozen weights, so each is trained almost as it would be alone:
        Adam is invariant to the constant factor 1/T of its gradients, which changes only once small
        tasks run out, and a task absent from a round is left as it is. The learning rate is common
        to all tasks. It follows the rounds; an epoch has as many as the largest task needs, and a
        smaller task takes its steps at the beginning of each epoch.

        Returns:
            held-out accuracies per task: before, in the last epoch, and in the best one.
        """
        s = self.settings
        before = self._accuracy(self.held_out)(model)
        own_seed = derive_seed("finetuning", seed)
        loader = self._loader(self.test, s.finetune_batch_size, seed=own_seed)
        config = self.finetuning_config(own_seed)
        common = self._common(self.held_out, Progress(f"{kind}, trial {seed}"), *callbacks)
        fresh = s.finetune_head == "fresh"
        if kind == "lora":
            adapter = self._adapter(known(rank))
            result = finetune_lora(model, loader, config, adapter, fresh_heads=fresh, **common)
        else:
            result = finetune_last_layer(model, loader, config, self.heads, fresh=fresh, **common)
        epochs = [record["validation_per_task"] for record in result.history]
        return {
            BEFORE: list(before.per_task),
            LAST: epochs[-1],
            BEST: [max(of_task) for of_task in zip(*epochs, strict=True)],
        }

    def work(self, kind: str) -> float:
        """What an epoch of a retraining or fine-tuning costs, in forward passes of a turn."""
        if kind in ("lora", "last-layer"):
            each = LORA if kind == "lora" else HEAD
            return each * len(self.test) + EVALUATION * len(self.held_out)
        return FULL * len(self.retraining) + EVALUATION * len(self.validation)

    def _common_config(self) -> dict[str, Any]:
        s = self.settings
        return {
            "optimizer": "adamw",
            "weight_decay": s.weight_decay,
            "schedule": "linear",
            "schedule_unit": "step",
            "precision": s.precision,
        }

    def _common(self, held_out: TokenizedTurns, *callbacks: Callback) -> dict[str, Any]:
        return {
            "loss": choice_loss,
            "validation": self._accuracy(held_out),
            "callbacks": callbacks,
        }

    def _adapter(self, rank: int) -> LoRAConfig:
        s = self.settings
        return LoRAConfig(rank=rank, alpha=s.alpha, dropout=s.dropout, heads=self.heads)

    def _accuracy(self, turns: TokenizedTurns) -> Callable[[nn.Module], Evaluation]:
        loader = self._loader(turns, len(turns), shuffle=False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)

        def accuracy(model: nn.Module) -> Evaluation:
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                return evaluate(model, loader, choice_accuracy)

        return accuracy

    def _loader(self, turns: TokenizedTurns, batch_size: int, **keywords: Any) -> RoundLoader:
        passes = SequencePasses(
            Sequences(turns.fields, turns.starts, turns.candidates),
            packed=self.packed,
            max_tokens=known(self.settings.max_tokens),
            pad_token_id=self.encoders.tokenizer.pad_token_id,
            position_offset=self._position_offset,
            device=self.device,
        )
        return RoundLoader(
            torch.arange(len(turns)),
            turns.answers,
            turns.task_ids,
            batch_size=batch_size,
            collate=passes,
            **keywords,
        )
