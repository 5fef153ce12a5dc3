"""Retraining on the text of some tasks, and adapting to a little text of others."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from experiments.lib import training
from experiments.lib.errors import RunError
from experiments.lib.retraining_settings import FINETUNES
from experiments.lib.statistics import worth_of
from experiments.lib.unused import at_most
from experiments.text.data import KB, Corpus, Task
from experiments.text.decoders import Decoders, head_names
from experiments.text.settings import TextSettings
from experiments.text.summary import BEFORE, BITS, PERPLEXITY, RATE, VALIDATION
from experiments.text.tokens import Part, few, tokenize
from metalora.adapters import LoRAConfig
from metalora.hf import SequencePasses, enable_packing, packing_problem, position_offset
from metalora.meta import (
    Callback,
    Evaluation,
    RoundLoader,
    TrainConfig,
    bits_per_byte,
    causal_lm_losses,
    evaluate,
    matmul_precision,
    mean_token_loss,
    perplexity,
)

EVALUATION_BATCH = 64  # sequences of each task


@dataclasses.dataclass(frozen=True)
class Unseen:
    """A group of unseen tasks: what may be learned from, and what is measured with."""

    names: tuple[str, ...]
    train: Part
    held_out: Part


class Trials(training.Trials[Part]):
    """The experiment on one device.

    Args:
        settings: resolved settings.
        corpus: the text.
        device: where to train.

    Attributes:
        unseen: "validation" and "test" tasks, as far as there are any.
        packed: whether sequences are run without padding.

    Raises:
        RunError: the model or its tokenizer is missing or damaged, or cannot be trained as asked.
    """

    samples = "sequences"
    finetune_rates = "--lora-rates or --last-layer-rates"
    with_head = ()

    def __init__(self, settings: TextSettings, corpus: Corpus, device: torch.device):
        self.settings, self.corpus, self.device = settings, corpus, device
        self.fixed: Mapping[str, Any] = {
            "optimizer": "adamw",
            "schedule": "cosine",
            "schedule_unit": "step",
        }
        self.inner = {"inner_optimizer": "adamw"}
        self.loss = {"loss": mean_token_loss, "forward": causal_lm_losses}
        self.decoders = Decoders(settings)
        self._length = min(settings.length, self.decoders.longest)
        model = self.decoders.new(0)
        self.heads = head_names(model)
        for kind in ("last-layer-ml", "last-layer"):
            if not self.heads and kind in (*settings.retrain, *settings.finetune):
                raise RunError(
                    f"{kind}: the model's output layer shares its weight with the embeddings, so "
                    "tasks cannot have one each; leave it out of --retrain and --finetune"
                )
        training.check_rank(model, settings.rank)
        self.retraining, self.validation = self._parts(corpus.retraining)
        self.unseen = {
            name: Unseen(tuple(task.name for task in group), *self._parts(group))
            for name, group in (("validation", corpus.validation), ("test", corpus.test))
            if group
        }
        self.packing_problem = None if settings.packed is False else packing_problem(model)
        if self.packing_problem is not None and settings.packed:
            raise RunError(f"--packed: {self.packing_problem}; leave it out")
        self.packed = settings.packed is not False and self.packing_problem is None
        self._offset = position_offset(model)
        self._steps_of: Part | None = None  # what an adaptation is configured for

    def _parts(self, tasks: tuple[Task, ...]) -> tuple[Part, Part]:
        """Returns the sequences to learn from, and those to measure with."""
        train, held_out = (
            tokenize(of, self.decoders.tokenizer, self._length)
            for of in ([task.train for task in tasks], [task.held_out for task in tasks])
        )
        return train, held_out

    def notes(self) -> list[str]:
        """Returns lines on what is left out, cut or padded."""
        lines = at_most("length", self.settings.length, self.decoders.longest, "the model takes")
        for task in self.corpus.every:
            if task.empty:
                lines.append(f"note: {task.name}: {task.empty} empty files or lines are left out")
        cut = sum(part.cut for part in self._all_parts())
        if cut:
            lines.append(
                f"note: {cut} prompts with their responses are longer than {self._length} tokens "
                "and lose the beginning of the prompt, or the end of the response"
            )
        if self.packing_problem is not None:
            lines.append(f"note: sequences are padded: {self.packing_problem}")
        return lines

    def facts(self) -> dict[str, Any]:
        """Returns what the data turned out to be, for the manifest."""
        parts = {"retraining": self.retraining, "held_out": self.validation}
        for name, group in self.unseen.items():
            parts |= {name: group.train, f"{name}_held_out": group.held_out}
        return {
            "retraining_tasks": [task.name for task in self.corpus.retraining],
            **{f"{name}_tasks": group.names for name, group in self.unseen.items()},
            "sequences": {name: torch.bincount(part.ids) for name, part in parts.items()},
            "tokens": {name: int(part.tokens.sum()) for name, part in parts.items()},
            "bytes": {name: int(part.bytes.sum()) for name, part in parts.items()},
            "sequences_cut_short": {name: part.cut for name, part in parts.items()},
            "parameters": sum(p.numel() for p in self.decoders.new(0).parameters()),
            "packed": self.packed,
        }

    def _all_parts(self) -> list[Part]:
        of_unseen = [part for g in self.unseen.values() for part in (g.train, g.held_out)]
        return [self.retraining, self.validation, *of_unseen]

    def new_model(self, seed: int) -> nn.Module:
        model: nn.Module = self.decoders.new(seed).to(self.device)
        return enable_packing(model) if self.packed else model

    def lora(self, rank: int | None) -> LoRAConfig:
        s = self.settings
        return LoRAConfig(rank=s.rank, alpha=s.alpha, dropout=s.dropout)

    def samples_per_epoch(self, method: str) -> int:
        return len(self.retraining)

    def config(self, kind: str, seed: int) -> TrainConfig:
        config = super().config(kind, seed)
        if kind == "reptile":  # the weights go a part of the way to each task's solution
            return dataclasses.replace(config, optimizer="sgd", weight_decay=0.0)
        if kind in FINETUNES:
            assert self._steps_of is not None
            epoch = len(self.loader(self._steps_of, self.settings.finetune_batch_size))
            steps = self.settings.finetune_steps
            return dataclasses.replace(config, epochs=max(1, round(steps / epoch)))
        return config

    def finetune(
        self, model: nn.Module, labels: training.Labels, *callbacks: Callback
    ) -> list[dict[str, Any]]:
        """Adapts to all test tasks, at the rate that is best on the validation tasks.

        The tasks of a group are adapted to side by side, each for itself.

        Returns:
            bits per byte and perplexity of each test task, the bits before it is adapted to, the
            rate, and the mean bits of the validation tasks with it.
        """
        s, kind = self.settings, labels["finetune"]
        rates = s.lora_rates if kind == "lora" else s.last_layer_rates
        found = {r: self._adapted(model, labels, "validation", r).mean for r in rates}
        best = max(found, key=lambda rate: worth_of(found[rate], lower_is_better=True))
        measured = [
            {"metric": VALIDATION, "value": found[best]},
            {"metric": RATE, "value": best},
        ]
        if s.tune:
            return measured
        group = self.unseen["test"]
        bits = self._adapted(model, labels, "test", best, *callbacks).per_task
        of_tasks = {
            BEFORE: self._bits(model, group.held_out).per_task,
            BITS: bits,
            PERPLEXITY: _perplexities(bits, group.held_out),
        }
        return measured + [
            {"task": task, "metric": metric, "value": value}
            for metric, values in of_tasks.items()
            for task, value in zip(group.names, values, strict=True)
        ]

    def _adapted(
        self,
        model: nn.Module,
        labels: training.Labels,
        group: str,
        rate: float,
        *callbacks: Callback,
    ) -> Evaluation:
        """Adapts a copy of the model to a group; returns the bits per byte of its tasks."""
        unseen = self.unseen[group]
        seed = training.seed_of(f"text of {group}", labels)
        part = few(
            unseen.train,
            round(KB * labels["amount"]),
            torch.Generator().manual_seed(seed),
        )
        own = copy.copy(self)
        own._steps_of = part
        model = copy.deepcopy(model)
        own._finetune(model, {**labels, "finetune_lr": rate}, part, None, *callbacks)
        return self._bits(model, unseen.held_out)

    def held_out(self, part: Part) -> Callable[[nn.Module], Evaluation]:
        """Returns a validation: minus the bits per byte, so that the highest is the best."""

        def minus_bits(model: nn.Module) -> Evaluation:
            found = self._bits(model, part)
            return Evaluation(tuple(-bits for bits in found.per_task), -found.mean)

        return minus_bits

    def _bits(self, model: nn.Module, part: Part) -> Evaluation:
        loader = self._batches(part, EVALUATION_BATCH, part.bytes, shuffle=False)
        with self._precision():
            return evaluate(model, loader, bits_per_byte, forward=causal_lm_losses)

    @contextlib.contextmanager
    def _precision(self) -> Iterator[None]:
        """Computes as trainings do."""
        s = self.settings
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(s.precision)
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with autocast, matmul_precision(s.matmul_precision):
            yield

    def loader(self, part: Part, batch_size: int, **keywords: Any) -> RoundLoader:
        sizes = part.tokens if self.settings.mean_over == "tokens" else None
        return self._batches(part, batch_size, sizes, **keywords)

    def _batches(
        self, part: Part, batch_size: int, sizes: torch.Tensor | None, **keywords: Any
    ) -> RoundLoader:
        passes = SequencePasses(
            part.sequences,
            packed=self.packed,
            max_tokens=self.settings.max_tokens,
            pad_token_id=self.decoders.tokenizer.pad,
            position_offset=self._offset,
            device=self.device,
        )
        numbers = torch.arange(len(part))
        return RoundLoader(
            numbers,
            numbers,
            part.ids,
            batch_size=batch_size,
            collate=passes,
            sizes=sizes,
            **keywords,
        )


def _perplexities(bits: Sequence[float], part: Part) -> tuple[float, ...]:
    """Returns each task's perplexity, over its tokens, from its bits per byte."""
    zeros = torch.zeros(len(bits), dtype=torch.int64)
    in_bytes, in_tokens = (zeros.index_add(0, part.ids, n) for n in (part.bytes, part.tokens))
    nats = math.log(2) * torch.tensor(bits, dtype=torch.float64) * in_bytes / in_tokens
    return perplexity(Evaluation(tuple(nats.tolist()), float(nats.mean()))).per_task
