"""Retraining on some personas and fine-tuning on others (paper, section 4 and appendix E.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments.language.data import Corpus, Task
from experiments.language.dialogues import Dialogue, Turn
from experiments.language.encoders import Encoders, has_token_types, head_names, max_length
from experiments.language.settings import PART_OF, LanguageSettings
from experiments.language.summary import BEFORE, BEST, LAST
from experiments.language.tokens import TokenizedTurns, tokenize
from experiments.lib import training
from experiments.lib.errors import RunError
from experiments.lib.unused import at_most
from metalora.adapters import LoRAConfig
from metalora.hf import (
    SequencePasses,
    Sequences,
    enable_packing,
    packing_problem,
    position_offset,
)
from metalora.meta import Batch, Callback, Evaluation, RoundLoader, evaluate, matmul_precision

# Of one token and epoch, in forward passes: the gradients of all weights cost two more, those of
# LoRA about one, and those of a last layer next to nothing.
EVALUATION, HEAD, LORA, FULL = 1.0, 1.0, 2.0, 3.0


def choice_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Averages cross-entropy of "is this the true one" over candidates, [B * n, 2] → [B]."""
    answers = batch.targets.to(logits.device)
    n = len(logits) // len(answers)
    truth = (torch.arange(n, device=logits.device) == answers[:, None]).long()
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(logits, truth.flatten(), reduction="none").view(-1, n).mean(1)


def choice_accuracy(logits: Tensor, batch: Batch) -> Tensor:
    """Returns 1 for each turn whose true candidate has the highest class-1 logit, else 0; [B]."""
    chosen = logits[:, 1].view(len(batch.targets), -1).argmax(1)
    return (chosen == batch.targets.to(chosen.device)).double()


def fewer_candidates(turn: Turn, count: int) -> Turn:
    """Returns a turn with its response and the first ``count - 1`` other candidates."""
    others = [c for i, c in enumerate(turn.candidates) if i != turn.answer][: count - 1]
    answer = turn.answer % count
    return Turn(turn.utterance, (*others[:answer], turn.response, *others[answer:]), answer)


class Trials(training.Trials[TokenizedTurns]):
    """The experiment on one device: its models, and the turns of all tasks as token sequences.

    Args:
        settings: resolved settings.
        corpus: the dialogues.
        device: where to train.
        start: folder of a model with its tokenizer, to begin with instead of the settings' model.

    Attributes:
        test, test_held_out: turns of the test tasks, in the same order of tasks; a corpus without
            any has none.
        packed: whether sequences are run without padding.

    Raises:
        RunError: the model or its tokenizer is missing or damaged, or a rank too large for it.
    """

    samples = "turns"

    def __init__(
        self,
        settings: LanguageSettings,
        corpus: Corpus,
        device: torch.device,
        start: Path | None = None,
    ):
        self.settings, self.corpus, self.device = settings, corpus, device
        own = settings.lora_heads == "own"
        self.with_head = [m for m in PART_OF["shared_head"] if own or m != "lora-ml"]
        self.fixed = {"optimizer": "adamw", "schedule": "linear", "schedule_unit": "step"}
        self.inner = {"inner_optimizer": "adamw"}
        self.loss = {"loss": choice_loss}
        every = [d for task in (*corpus.retraining, *corpus.testing) for d in task.train]
        s = settings
        texts = (
            c
            for d in every
            for turn in d.turns[: s.turns]
            for c in (turn.utterance, *turn.candidates)
        )
        if start is None:
            self.encoders = Encoders(s.model, s.tokenizer, texts)
        else:
            self.encoders = Encoders(str(start), None, ())
        model = self.encoders.new(0)
        training.check_rank(model, max(settings.rank))
        self.heads = head_names(model)
        self._longest = max_length(model)

        def turns(tasks: Sequence[Sequence[Dialogue]]) -> TokenizedTurns:
            return tokenize(
                tasks,
                self.encoders.tokenizer,
                max_length=min(self._longest, settings.max_length or self._longest),
                token_types=has_token_types(model, self.encoders.tokenizer),
                history=settings.history,
            )

        def train(tasks: Sequence[Task]) -> TokenizedTurns:
            few = s.train_candidates
            return turns([[self._cut(d, few) for d in t.train[: s.dialogues]] for t in tasks])

        def held_out(tasks: Sequence[Task]) -> TokenizedTurns:
            return turns([list(map(self._cut, t.held_out)) for t in tasks])

        self.retraining, self.validation = train(corpus.retraining), held_out(corpus.retraining)
        if corpus.testing:
            self.test, self.test_held_out = train(corpus.testing), held_out(corpus.testing)
        problem = packing_problem(model) if settings.packed in (None, True) else None
        if problem is not None and settings.packed:
            raise RunError(f"--packed: {problem}; leave it out")
        self.packed = settings.packed is not False and problem is None
        self._position_offset = position_offset(model)

    def _cut(self, dialogue: Dialogue, candidates: int | None = None) -> Dialogue:
        """Returns a dialogue's first turns, as the settings say, with so many candidates each."""
        turns = dialogue.turns[: self.settings.turns]
        if candidates is not None:
            turns = tuple(fewer_candidates(turn, candidates) for turn in turns)
        return dataclasses.replace(dialogue, turns=turns)

    def work(self, kind: str) -> float:
        """Returns the cost of an epoch, in forward passes of a token."""
        if kind in ("lora", "last-layer"):
            each = LORA if kind == "lora" else HEAD
            evaluation = EVALUATION * self.test_held_out.tokens / self.settings.evaluate_every
            return each * self.test.tokens + evaluation
        if kind == "none":
            return 0.0
        return FULL * self.retraining.tokens + EVALUATION * self.validation.tokens

    def notes(self) -> list[str]:
        """Returns lines on what is left out or cut, and on settings beyond what there is."""
        lines = self._beyond()
        for file in self.corpus.files:
            if file.unmatched:
                lines.append(
                    f"note: {file.path}: {len(file.unmatched)} dialogues are left out, whose "
                    f"personas match no cluster, first {file.unmatched[0]}"
                )
        for name, turns in self._parts().items():
            if turns.truncated:
                lines.append(
                    f"note: {name.replace('_', '-')}: {turns.truncated} of {len(turns)} turns are "
                    "too long for the model and lose their oldest tokens"
                )
        return lines

    def _beyond(self) -> list[str]:
        s, every = self.settings, [*self.corpus.retraining, *self.corpus.testing]
        turns = max(len(d.turns) for task in every for d in (*task.train, *task.held_out))
        most = max(len(task.train) for task in every)
        return [
            *at_most("dialogues", s.dialogues, most, "the tasks have"),
            *at_most("turns", s.turns, turns, "the dialogues have"),
            *at_most(
                "history",
                s.history,
                2 * min(turns, s.turns or turns) - 1,
                "before a response there are",
            ),
            *at_most("max_length", s.max_length, self._longest, "the model takes"),
        ]

    def facts(self) -> dict[str, Any]:
        """Returns what the data turned out to be, for the manifest."""
        corpus, parts = self.corpus, self._parts()
        return {
            "retraining_clusters": [task.cluster for task in corpus.retraining],
            "test_clusters": [task.cluster for task in corpus.testing],
            "turns": {name: torch.bincount(turns.task_ids) for name, turns in parts.items()},
            "tokens": {name: turns.tokens for name, turns in parts.items()},
            "turns_cut_short": {name: turns.truncated for name, turns in parts.items()},
            "dialogues": {file.path.name: file.counts for file in corpus.files},
            "other_sides_left_out": corpus.other_sides,
            "packed": self.packed,
        }

    def _parts(self) -> dict[str, TokenizedTurns]:
        parts = {"retraining": self.retraining, "validation": self.validation}
        if self.corpus.testing:
            parts |= {"test": self.test, "held_out": self.test_held_out}
        return parts

    def new_model(self, seed: int) -> nn.Module:
        model = self.encoders.new(seed).to(self.device)
        return enable_packing(model) if self.packed else model

    def finetune(
        self, model: nn.Module, labels: training.Labels, *callbacks: Callback
    ) -> list[dict[str, Any]]:
        """Adapts the model, in place, to all test tasks side by side, each for itself.

        The tasks share only the frozen weights, so each is trained almost as it would be alone:
        Adam is invariant to the constant factor 1/T of its gradients, which changes only once small
        tasks run out, and a task absent from a round is left as it is. The learning rate is common
        to all tasks. It follows the rounds; an epoch has as many as the largest task needs, and a
        smaller task takes its steps at the beginning of each epoch.

        Returns:
            held-out accuracies of each task: before, in the last epoch and, if all were measured,
            in its best one.
        """
        every = self.settings.evaluate_every
        before = self.held_out(self.test_held_out)(model).per_task
        result = self._finetune(
            model, labels, self.test, self.test_held_out, *callbacks, validate_every=every
        )
        measured = {BEFORE: before, LAST: result.history[-1]["validation_per_task"]}
        if every == 1:
            epochs = [record["validation_per_task"] for record in result.history]
            measured[BEST] = [max(of_task) for of_task in zip(*epochs, strict=True)]
        clusters = [str(task.cluster) for task in self.corpus.testing]
        return [
            {"task": task, "metric": metric, "value": value}
            for metric, values in measured.items()
            for task, value in zip(clusters, values, strict=True)
        ]

    def samples_per_epoch(self, method: str) -> int:
        return len(self.retraining)

    def lora(self, rank: int | None) -> LoRAConfig:
        assert rank is not None
        s = self.settings
        return LoRAConfig(rank=rank, alpha=s.alpha, dropout=s.dropout, heads=self.heads)

    def retraining_lora(self, rank: int | None) -> LoRAConfig:
        own = self.lora(rank)
        if self.settings.lora_heads == "own":
            return own
        return dataclasses.replace(own, heads=(), exclude_modules=self.heads)

    def held_out(self, part: TokenizedTurns) -> Callable[[nn.Module], Evaluation]:
        loader = self.loader(part, len(part), shuffle=False)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.settings.precision)

        def accuracy(model: nn.Module) -> Evaluation:
            autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
            with autocast, matmul_precision(self.settings.matmul_precision):
                return evaluate(model, loader, choice_accuracy)

        return accuracy

    def loader(self, part: TokenizedTurns, batch_size: int, **keywords: Any) -> RoundLoader:
        passes = SequencePasses(
            Sequences(part.fields, part.starts, part.per_turn),
            packed=self.packed,
            max_tokens=self.settings.max_tokens,
            pad_token_id=self.encoders.tokenizer.pad_token_id,
            position_offset=self._position_offset,
            device=self.device,
        )
        return RoundLoader(
            torch.arange(len(part)),
            part.answers,
            part.task_ids,
            batch_size=batch_size,
            collate=passes,
            **keywords,
        )
