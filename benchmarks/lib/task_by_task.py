"""The authors' schedule in plain PyTorch and transformers, and the same through PEFT.

A round takes a batch of each task in turn, pads its sequences to one length, sums the gradients,
and steps AdamW once. Each task has LoRA pairs and a head of its own; all weights are trained. The
authors step after every task's batch, which takes longer; with one step for all tasks, all measured
versions compute the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalora.hf import Sequences
from metalora.meta import Batch
from metalora.meta.steps import Loss

RANK, ALPHA, DROPOUT, RATE = 8, 16, 0.1, 5e-5
TARGETS = r".*\.encoder\..*\.(query|key|value|dense)"  # the linear layers of the encoder
HEAD = "classifier"


class LoRALinear(nn.Module):
    """y = x Wᵀ + b + s · dropout(x) A_tᵀ B_tᵀ for the one task t that is selected."""

    def __init__(self, linear: nn.Linear, num_tasks: int) -> None:
        super().__init__()
        self.weight, self.bias, self.task = linear.weight, linear.bias, 0
        new, (outer, inner) = linear.weight.new_zeros, linear.weight.shape
        self.lora_A = nn.ParameterList(new(RANK, inner) for _ in range(num_tasks))
        self.lora_B = nn.ParameterList(new(outer, RANK) for _ in range(num_tasks))
        for lora_a in self.lora_A:
            nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor) -> Tensor:
        update = F.linear(self.dropout(x), self.lora_A[self.task])
        update = F.linear(update, self.lora_B[self.task])
        return F.linear(x, self.weight, self.bias) + ALPHA / RANK * update


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


def plain(model: nn.Module, num_tasks: int) -> Selectable:
    """The model with layers in plain PyTorch."""
    layers: list[LoRALinear | Heads] = []
    for name, module in list(model.named_modules()):
        if name == HEAD:
            layers.append(Heads(deepcopy(module) for _ in range(num_tasks)))
        elif re.fullmatch(TARGETS, name):
            layers.append(LoRALinear(module, num_tasks))
        else:
            continue
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layers[-1])

    def select(task: int) -> None:
        for layer in layers:
            layer.task = task

    return Selectable(model, select, _by_name(model, (r"\b(lora_[AB]|classifier)\.\d+", r"\1")))


def peft(model: nn.Module, num_tasks: int) -> Selectable:
    """The model with PEFT's layers and ``set_adapter``."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=TARGETS,
        modules_to_save=[HEAD],
    )
    names = [f"task{t}" for t in range(num_tasks)]
    wrapped: Any = get_peft_model(model, config, names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, config)
    parameters = _by_name(
        wrapped,
        (r"^base_model\.model\.|\.base_layer|\.modules_to_save\.task\d+", ""),
        (r"\b(lora_[AB])\.task\d+\.weight", r"\1"),
    )
    parameters = {n: found for n, found in parameters.items() if "original_module" not in n}
    for found in parameters.values():
        for parameter in found:
            parameter.requires_grad_()  # PEFT froze the shared weights
    return Selectable(wrapped, lambda task: wrapped.set_adapter(names[task]), parameters)


def _by_name(model: nn.Module, *changes: tuple[str, str]) -> dict[str, list[nn.Parameter]]:
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
    """Trains a `Selectable` on rounds of sample numbers.

    ``lengths``: to which each task's sequences are padded; None pads a batch to its longest.
    ``precision``: "fp32", or "bf16" with autocast.
    """

    def __init__(
        self,
        what: Selectable,
        sequences: Sequences,
        pad_token_id: int,
        loss: Loss,
        lengths: Sequence[int] | None = None,
        precision: str = "fp32",
    ) -> None:
        self.model, self.parameters, self._select = what.model, what.parameters, what.select
        self.sequences, self.pad_token_id, self.lengths = sequences, pad_token_id, lengths
        self.loss, self.precision = loss, precision
        every = [p for found in self.parameters.values() for p in found]
        self.device = every[0].device
        self.optimizer = torch.optim.AdamW(every, lr=RATE)

    def inputs(self, batch: Batch) -> Iterator[dict[str, Tensor]]:
        """The model's inputs, task by task."""
        for task, part in zip(batch.tasks_present(), batch.by_task(), strict=True):
            length = None if self.lengths is None else self.lengths[task]
            inputs = padded(self.sequences, part.inputs, self.pad_token_id, length)
            yield {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def backward(self, batch: Batch) -> Tensor:
        """Sums the gradients of the mean over tasks of the mean over samples; returns its value."""
        self.model.zero_grad()
        present, losses = batch.tasks_present(), []
        for task, part, inputs in zip(present, batch.by_task(), self.inputs(batch), strict=True):
            self._select(task)
            with torch.autocast(self.device.type, torch.bfloat16, self.precision == "bf16"):
                loss = self.loss(self.model(**inputs).logits, part).mean() / len(present)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def round(self, batch: Batch) -> None:
        """One training step."""
        self.backward(batch)
        self.optimizer.step()
