"""The ways to train a round of the language experiment, and their correctness gate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.lib.dialogues import Turns
from benchmarks.lib.gate import GateError, check_parts
from benchmarks.lib.task_by_task import (
    ALPHA,
    DROPOUT,
    HEAD,
    RANK,
    RATE,
    TARGETS,
    Selectable,
    TaskByTask,
    padded,
    peft,
    plain,
)
from experiments.language.trials import choice_loss
from metalora.adapters import LoRAConfig, adapt, task_parameters
from metalora.hf import SequencePasses, enable_packing, position_offset
from metalora.meta import Batch, GradientStep, RoundLoader, TrainConfig
from metalora.meta.data import Collate

AUTHORS, PEFT = "the authors' schedule", "the same through PEFT"
TOLERANCE = {"fp32": 1e-4, "bf16": 0.1}
LOSS = "the loss"
FLOOR = 1e-3  # of the largest gradient: errors of smaller ones are relative to this size


@dataclass(frozen=True)
class Setting:
    """What all versions share; ``model`` is plain, and copied before it is trained."""

    model: Any
    turns: Turns
    rounds: RoundLoader
    max_tokens: int
    device: str

    @property
    def pad_token_id(self) -> int:
        token: int = self.model.config.pad_token_id
        return token

    @property
    def num_tasks(self) -> int:
        return self.rounds.num_tasks


class AllTasks:
    """All tasks of a round together, with metalora; has what `TaskByTask` has."""

    def __init__(
        self,
        setting: Setting,
        collate: Collate,
        *,
        packed: bool = False,
        fused: bool = False,
        precision: str = "fp32",
    ) -> None:
        self.model, self.precision = adapted(setting), precision
        if packed:
            enable_packing(self.model)
        self.parameters = {name: [p] for name, p in self.model.named_parameters()}
        self.collate = collate
        config = TrainConfig(1, RATE, 0.01, optimizer="adamw", precision=precision)
        self.step = GradientStep(self.model, setting.rounds, config, loss=choice_loss)
        if not fused:
            self.step.optimizer = torch.optim.AdamW(self.step.parameters, lr=RATE)

    def inputs(self, batch: Batch) -> Iterable[Mapping[str, Any]]:
        return (part.inputs for part in self.collate(batch))

    def backward(self, batch: Batch) -> Tensor:
        self.model.zero_grad()
        return self.step.objective.backward(replace(batch, collate=self.collate), self.step.scaler)

    def round(self, batch: Batch) -> None:
        self.step([replace(batch, collate=self.collate)])


Version = AllTasks | TaskByTask


def adapted(setting: Setting) -> nn.Module:
    """A copy of the model with metalora's layers, each task's parameters drawn at random."""
    config = LoRAConfig(RANK, ALPHA, DROPOUT, TARGETS, heads=[HEAD])
    model = adapt(deepcopy(setting.model), config, setting.num_tasks)
    generator = torch.Generator(setting.device).manual_seed(1)
    for parameter in task_parameters(model):
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def padded_rounds(setting: Setting) -> Collate:
    """Passes in the order of the tasks, all padded to the longest sequence of the round."""
    sequences = setting.turns.sequences

    def collate(batch: Batch) -> Iterable[Batch]:
        longest = int(sequences.lengths[batch.inputs].max())
        count = max(1, setting.max_tokens // (longest * sequences.per_sample))
        for start in range(0, len(batch.inputs), count):
            part = batch.take(slice(start, start + count))
            inputs = padded(sequences, part.inputs, setting.pad_token_id, longest)
            inputs = {name: tensor.to(setting.device) for name, tensor in inputs.items()}
            yield replace(part, inputs=inputs, collate=None)

    return collate


def versions(setting: Setting, precision: str = "fp32") -> dict[str, Callable[[], Version]]:
    """By name, what makes each version: the authors', the same through PEFT, then each with one
    thing more than the one before; with another precision than fp32, all three in it."""
    sequences, pad = setting.turns.sequences, setting.pad_token_id

    def one_task(
        make: Callable[[nn.Module, int], Selectable],
        lengths: Sequence[int] | None,
        precision: str = "fp32",
    ) -> Version:
        what = make(deepcopy(setting.model), setting.num_tasks)
        return TaskByTask(what, sequences, pad, choice_loss, lengths, precision)

    def ours(packed: bool, *, fused: bool = False, precision: str = "fp32") -> Version:
        collate = SequencePasses(
            sequences,
            packed=packed,
            max_tokens=setting.max_tokens,
            pad_token_id=pad,
            position_offset=position_offset(setting.model),
            device=setting.device,
        )
        return AllTasks(setting, collate, packed=packed, fused=fused, precision=precision)

    found: dict[str, Callable[[], Version]] = {
        AUTHORS: lambda: one_task(plain, setting.turns.longest),
        PEFT: lambda: one_task(peft, setting.turns.longest),
        "authors', padded to the batch": lambda: one_task(plain, None),
        "metalora, all tasks at once": lambda: AllTasks(setting, padded_rounds(setting)),
        "+ sorted by length": lambda: ours(False),
        "+ packed": lambda: ours(True),
        "+ fused AdamW": lambda: ours(True, fused=True),
    }
    if precision != "fp32":
        found[f"+ {precision}"] = lambda: ours(True, fused=True, precision=precision)
        longest = setting.turns.longest
        found[f"{AUTHORS}, {precision}"] = lambda: one_task(plain, longest, precision)
        found[f"{PEFT}, {precision}"] = lambda: one_task(peft, longest, precision)
    return found


def gate_batch(setting: Setting) -> Batch:
    """One turn of each task."""
    loader = setting.rounds
    one = RoundLoader(loader.inputs, loader.targets, loader.task_ids, batch_size=1, max_rounds=1)
    return next(iter(one))


def exact(setting: Setting, batch: Batch) -> dict[str, Tensor]:
    """The loss and all gradients of a round in float64, [1 or T, ...] each, without dropout."""
    what = plain(deepcopy(setting.model).double(), setting.num_tasks)
    version = TaskByTask(what, setting.turns.sequences, setting.pad_token_id, choice_loss)
    return results(version, setting, batch)


def results(version: Version, setting: Setting, batch: Batch) -> dict[str, Tensor]:
    """A version's loss and gradients at the starting values that all versions share."""
    start = dict(adapted(setting).named_parameters())
    if start.keys() != version.parameters.keys():
        different = sorted(start.keys() ^ version.parameters.keys())
        raise GateError(f"not the same parameters: {', '.join(different[:3])}")
    with torch.no_grad():
        for name, found in version.parameters.items():
            values = start[name].reshape(len(found), *found[0].shape)
            for parameter, value in zip(found, values, strict=True):
                parameter.copy_(value)
    version.model.eval()
    gradients = {LOSS: version.backward(batch).view(1, 1)}
    for name, found in version.parameters.items():
        each = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
        gradients[name] = torch.stack(each)
    version.model.zero_grad()
    version.model.train()
    return gradients


def check(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float) -> float:
    """The largest relative error ‖got - wanted‖ / ‖wanted‖ of the loss and of any task's gradients.

    Raises:
        GateError: if it is above the tolerance.
    """
    sizes = [float(g.flatten(1).norm(dim=1).max()) for name, g in wanted.items() if name != LOSS]
    floor = FLOOR * max(sizes)
    return max(
        check_parts(name, got[name].reshape(right.shape), right, tolerance, floor)
        for name, right in wanted.items()
    )
