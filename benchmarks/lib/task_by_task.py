"""The authors' schedule in plain PyTorch, the same through PEFT, and merged weights.

A round takes a batch of each task in turn, sums the gradients, and steps the optimiser once. Each
task has LoRA pairs and, where the setting says so, a head of its own; all weights are trained. The
authors step after every task's batch, which takes longer; with one step for all tasks, all measured
versions compute the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalora.adapters import LoRAConfig
from metalora.hf import Sequences
from metalora.meta import Batch, TrainConfig, matmul_precision
from metalora.meta.data import Collate
from metalora.meta.optimizer import NAMED
from metalora.meta.steps import Loss, call_model
from metalora.nn import MultiTaskLoRALinear

FASTER = "faster fp32"
PRECISIONS = ("fp32", FASTER, "bf16")


def products(precision: str) -> AbstractContextManager[None]:
    """With "faster fp32", torch's float32 products on the CPU are those of the faster library."""
    return matmul_precision("ieee" if precision == FASTER else "default")


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + s · dropout(x) A_tᵀ B_tᵀ for the one task t that is selected."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig, num_tasks: int) -> None:
        super().__init__()
        self.weight, self.bias, self.task = linear.weight, linear.bias, 0
        new, (outer, inner), rank = linear.weight.new_zeros, linear.weight.shape, config.rank
        self.lora_A = nn.ParameterList(new(rank, inner) for _ in range(num_tasks))
        self.lora_B = nn.ParameterList(new(outer, rank) for _ in range(num_tasks))
        for lora_a in self.lora_A:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        self.dropout, self.scaling = nn.Dropout(config.dropout), scaling(config)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(self.dropout(x), self.lora_A[self.task])
        update = F.linear(update, self.lora_B[self.task])
        return F.linear(x, self.weight, self.bias) + self.scaling * update


def scaling(config: LoRAConfig) -> float:
    """s = alpha / r."""
    return 1.0 if config.alpha is None else config.alpha / config.rank


class Heads(nn.ModuleList):
    """A classifier for each task, of which one is selected."""

    task = 0

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self[self.task](features)
        return logits


@dataclass(frozen=True)
class Selectable:
    """A model that runs one task at a time.

    ``parameters``: by the name in the model that metalora adapts, the one parameter, or those of
    all tasks.
    """

    model: nn.Module
    select: Callable[[int], None]
    parameters: dict[str, list[nn.Parameter]]


def authors(model: nn.Module, config: LoRAConfig, num_tasks: int) -> Selectable:
    """The model with layers in plain PyTorch."""
    layers: list[LoRALinear | Heads] = []
    for name, module in list(model.named_modules()):
        if name in config.heads:
            layers.append(Heads(deepcopy(module) for _ in range(num_tasks)))
        elif re.fullmatch(str(config.target_modules), name):
            layers.append(LoRALinear(module, config, num_tasks))
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layers[-1])

    def select(task: int) -> None:
        for layer in layers:
            layer.task = task

    own = "|".join(["lora_[AB]", *map(re.escape, config.heads)])
    return Selectable(model, select, by_name(model, (rf"\b({own})\.\d+", r"\1")))


def peft(model: nn.Module, config: LoRAConfig, num_tasks: int) -> Selectable:
    """The model with PEFT's layers and ``set_adapter``."""
    from peft import LoraConfig, get_peft_model

    alpha: Any = scaling(config) * config.rank
    of_task = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=str(config.target_modules),
        modules_to_save=list(config.heads) or None,
    )
    names = [f"task{t}" for t in range(num_tasks)]
    wrapped: Any = get_peft_model(model, of_task, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, of_task)
    parameters = by_name(
        wrapped,
        (r"^base_model\.model\.|\.base_layer|\.modules_to_save\.task\d+", ""),
        (r"\b(lora_[AB])\.task\d+\.weight", r"\1"),
    )
    parameters = {n: found for n, found in parameters.items() if "original_module" not in n}
    for found in parameters.values():
        for parameter in found:
            parameter.requires_grad_()  # PEFT froze the shared weights
    return Selectable(wrapped, lambda task: wrapped.set_adapter(names[task]), parameters)


def by_name(model: nn.Module, *changes: tuple[str, str]) -> dict[str, list[nn.Parameter]]:
    """The parameters, grouped by their names after the changes."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        for pattern, new in changes:
            name = re.sub(pattern, new, name)
        found.setdefault(name, []).append(parameter)
    return found


def padded(
    sequences: Sequences, samples: Tensor, pad_token_id: int, length: int | None = None
) -> dict[str, Tensor]:
    """The sequences of these samples, [n, length]; None is the length of the longest of them."""
    taken = sequences.take(samples)
    starts, ends = taken.starts[:-1, None], taken.starts[1:, None]
    places = starts + torch.arange(length or int(taken.lengths.max()))
    real = places < ends
    inputs = {"attention_mask": real.long()}
    for name, tokens in taken.fields.items():
        blank = pad_token_id if name == "input_ids" else 0
        inputs[name] = torch.where(real, tokens[places.clamp_max(len(tokens) - 1)], blank).long()
    return inputs


class TaskByTask:
    """Trains a `Selectable`; ``collate`` turns a batch of one task into passes of the model."""

    def __init__(
        self,
        what: Selectable,
        collate: Collate,
        loss: Loss,
        config: TrainConfig,
        precision: str = "fp32",
    ) -> None:
        self.model, self.parameters, self._select = what.model, what.parameters, what.select
        self.collate, self.loss, self.precision = collate, loss, precision
        every = [p for found in self.parameters.values() for p in found]
        self.device = every[0].device.type
        kind: Any = NAMED[config.optimizer]
        self.optimizer = kind(every, lr=config.lr, weight_decay=config.weight_decay)

    def passes(self, batch: Batch) -> Iterator[tuple[int, Batch]]:
        """What the model is called with, task by task."""
        for task, part in zip(batch.tasks_present(), batch.by_task(), strict=True):
            yield from ((task, one) for one in self.collate(part))

    def inputs(self, batch: Batch) -> Iterator[Any]:
        """The model's inputs, task by task."""
        return (part.inputs for _, part in self.passes(batch))

    def backward(self, batch: Batch) -> Tensor:
        """Sums the gradients of the mean over tasks of the mean over samples; returns its value."""
        self.model.zero_grad()
        assert batch.counts is not None
        present, losses = len(batch.tasks_present()), []
        for task, part in self.passes(batch):
            self._select(task)
            with (
                products(self.precision),
                torch.autocast(self.device, torch.bfloat16, self.precision == "bf16"),
            ):
                outputs = call_model(self.model, part.inputs)
                loss = self.loss(outputs, part).sum() / (batch.counts[task] * present)
                loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def round(self, batch: Batch) -> None:
        """One training step."""
        self.backward(batch)
        self.optimizer.step()


class MergedLinear(nn.Module):
    """y = x (W + s · B_t A_t)ᵀ + b, every W_t formed first; equal tasks in one batched product.

    ``counts``: shared by all layers, how many samples of each task the pass has.
    """

    def __init__(self, layer: MultiTaskLoRALinear, counts: list[int]) -> None:
        super().__init__()
        assert layer.bias is not None  # every layer of these models has one
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_A, self.lora_B = layer.lora_A, layer.lora_B
        self.scaling, self.counts = layer.scaling, counts

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # which would round W before the sum
            merged = torch.baddbmm(
                self.weight.unsqueeze(0), self.lora_B, self.lora_A, alpha=self.scaling
            )
        rows = x.reshape(-1, x.shape[-1])
        if torch.is_autocast_enabled(x.device.type):
            rows, merged = rows.bfloat16(), merged.bfloat16()
        present = [t for t, count in enumerate(self.counts) if count]
        sizes = [self.counts[t] * len(rows) // sum(self.counts) for t in present]
        if len(set(sizes)) == 1 and len(present) == len(merged):
            y = torch.baddbmm(self.bias, rows.view(len(sizes), sizes[0], -1), merged.mT)
            y = y.flatten(0, 1)
        else:
            parts = zip(rows.split(sizes), present, strict=True)
            y = torch.cat([F.linear(part, merged[t], self.bias) for part, t in parts])
        return y.unflatten(0, x.shape[:-1])


def merged(model: nn.Module) -> tuple[nn.Module, list[int]]:
    """An adapted model with `MergedLinear` layers, in place, and their list of counts."""
    counts: list[int] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, MultiTaskLoRALinear):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, MergedLinear(module, counts))
    return model, counts
