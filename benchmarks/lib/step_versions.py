"""The ways to take a training step of LoRA-ML on the same data, and their correctness gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.dialogues import Turns
from benchmarks.lib.gate import GateError, check_parts
from benchmarks.lib.task_by_task import (
    FASTER,
    PRECISIONS,
    Selectable,
    TaskByTask,
    authors,
    by_name,
    merged,
    padded,
    peft,
    products,
)
from experiments.language.trials import choice_loss
from metalora.adapters import LoRAConfig, adapt, task_parameters
from metalora.hf import SequencePasses, enable_packing, position_offset
from metalora.meta import Batch, GradientStep, RoundLoader, TrainConfig, cross_entropy
from metalora.meta.data import Collate
from metalora.meta.optimizer import NAMED
from metalora.meta.steps import Loss

PLAIN, AUTHORS, PEFT = "plain model", "the authors' schedule", "the same through PEFT"
TO_THE_BATCH, MERGED = "authors', padded to the batch", "merged weights"
AT_ONCE, SORTED, PACKED = "metalora, all tasks at once", "+ sorted by length", "+ packed"
FUSED, COMPILED = "+ fused optimiser", "+ compile"
TOLERANCE = {"fp32": 1e-4, FASTER: 1e-4, "bf16": 0.1}
LOSS = "the loss"
# Of the largest gradient: errors of smaller ones are relative to this size.
FLOOR = {"fp32": 1e-3, FASTER: 1e-3, "bf16": 1e-2}
RANK, ALPHA, DROPOUT, RATE = 8, 16, 0.1, 5e-5  # of the language experiment
TARGETS = r".*\.encoder\..*\.(query|key|value|dense)"  # the linear layers of the encoder
HEAD = "classifier"
MAX_TOKENS = {"cpu": 16384, "cuda": 32768}  # in a pass of metalora's


def in_precision(name: str, precision: str) -> str:
    """What a version that exists in several precisions is called."""
    return name if precision == "fp32" else f"{name}, {precision}"


@dataclass(frozen=True)
class Setting:
    """What all versions of a training share.

    Attributes:
        model: plain, and copied before it is trained.
        rounds: the loader, whose samples are what the collates take.
        batches: the rounds to time, each of which is a step.
        few: the round that the gate compares.
        lora: the adapters and heads; ``target_modules`` is a regular expression.
        config: of the training; its precision is that of each version.
        loss: of each sample.
        one_task: by the names of versions, how a batch of one task becomes passes of the model.
        together: by the names of versions, the same for all tasks at once, made anew for each.
        work: the unit of what a round works on, and how much it is.
    """

    model: Any
    rounds: RoundLoader
    batches: Sequence[Batch]
    few: Batch
    lora: LoRAConfig
    config: TrainConfig
    loss: Loss
    one_task: Mapping[str, Collate]
    together: Mapping[str, Callable[[], Collate]]
    work: tuple[str, float]

    @property
    def device(self) -> str:
        """Where the model is."""
        kind: str = next(self.model.parameters()).device.type
        return kind


def language_lora(dropout: float = DROPOUT) -> LoRAConfig:
    """The adapters of the language experiment."""
    return LoRAConfig(RANK, ALPHA, dropout, TARGETS, heads=[HEAD])


def decoder_lora() -> LoRAConfig:
    """The same adapters on the linear layers of a Llama's decoder."""
    return LoRAConfig(RANK, ALPHA, DROPOUT, r".*\.(q|k|v|o|gate|up|down)_proj")


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Each sample's mean over the next tokens of its one sequence, padded or packed: [B]."""
    ids, packing = batch.inputs["input_ids"], batch.inputs.get("packing")
    if packing is None:
        following = F.pad(batch.inputs["attention_mask"][:, 1:].bool(), (0, 1))
    else:
        following = torch.ones_like(ids, dtype=torch.bool)
        following[0, packing.ends[1:].long() - 1] = False
    labels = torch.where(following, ids.roll(-1, 1), -100)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    lengths = batch.lengths or [ids.shape[1]] * len(ids)
    sums = torch.stack([part.sum() for part in losses.split(list(lengths))])
    return sums / torch.stack([part.sum() for part in following.flatten().split(list(lengths))])


def language_setting(
    model: Any,
    turns: Turns,
    rounds: RoundLoader,
    max_tokens: int,
    device: str,
    lora: LoRAConfig,
    loss: Loss = choice_loss,
) -> Setting:
    """Training on turns of dialogues, with at most ``max_tokens`` in a pass of metalora's."""
    sequences, pad, batches = turns.sequences, model.config.pad_token_id, list(rounds)

    def of_task(lengths: Sequence[int] | None, batch: Batch) -> Iterator[Batch]:
        length = None if lengths is None else lengths[int(batch.task_ids[0])]
        inputs = padded(sequences, batch.inputs, pad, length)
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        yield replace(batch, inputs=inputs, collate=None)

    def of_round(batch: Batch) -> Iterator[Batch]:
        """Passes in the order of the tasks, all padded to the longest sequence of the round."""
        longest = int(sequences.lengths[batch.inputs].max())
        count = max(1, max_tokens // (longest * sequences.per_sample))
        for start in range(0, len(batch.inputs), count):
            part = batch.take(slice(start, start + count))
            part = replace(part, counts=tuple(torch.bincount(part.task_ids).tolist()))
            inputs = padded(sequences, part.inputs, pad, longest)
            inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
            yield replace(part, inputs=inputs, collate=None)

    def passes(packed: bool) -> Collate:
        return SequencePasses(
            sequences,
            packed=packed,
            max_tokens=max_tokens,
            pad_token_id=pad,
            position_offset=position_offset(model),
            device=device,
        )

    tokens = [int(sequences.lengths[batch.inputs].sum()) for batch in batches]
    return Setting(
        model.to(device),
        rounds,
        batches,
        shortest_turns(turns),
        lora,
        TrainConfig(1, RATE, 0.01, optimizer="adamw"),
        loss,
        {AUTHORS: partial(of_task, turns.longest), TO_THE_BATCH: partial(of_task, None)},
        {
            AT_ONCE: lambda: of_round,
            SORTED: partial(passes, False),
            PACKED: partial(passes, True),
        },
        ("tokens/s", sum(tokens) / len(tokens)),
    )


def shortest_turns(turns: Turns) -> Batch:
    """The turn with the fewest tokens of each task."""
    tokens, ids = turns.sequences.lengths.sum(1), turns.task_ids
    tasks = range(int(ids.max()) + 1)
    chosen = [int(torch.where(ids == t, tokens, tokens.max() + 1).argmin()) for t in tasks]
    samples = torch.tensor(chosen)
    return Batch(samples, turns.answers[samples], torch.arange(len(tasks)), (1,) * len(tasks))


def tensor_setting(
    model: nn.Module,
    rounds: RoundLoader,
    batch: Batch,
    few: Batch,
    lora: LoRAConfig,
    config: TrainConfig,
    unit: str,
    collate: Collate | None = None,
) -> Setting:
    """Training on tensors; ``collate`` cuts a batch into passes."""
    passes: Collate = collate or (lambda batch: (batch,))
    return Setting(
        model,
        rounds,
        [batch],
        few,
        lora,
        config,
        cross_entropy,
        {AUTHORS: passes},
        {AT_ONCE: lambda: passes},
        (unit, float(len(batch.targets))),
    )


class AllTasks:
    """A step on all tasks of a round together; has what `TaskByTask` has.

    ``fused``: of torch's optimiser; None is metalora's own.
    """

    def __init__(
        self,
        setting: Setting,
        model: nn.Module,
        collate: Collate,
        precision: str = "fp32",
        *,
        packed: bool = False,
        fused: bool | None = None,
        compiled: bool = False,
    ) -> None:
        self.model, self.precision, self.collate = model, precision, collate
        if packed:
            enable_packing(model)
        self.parameters = by_name(model)
        config = replace(setting.config, precision="bf16" if precision == "bf16" else "fp32")
        self.step = GradientStep(model, setting.rounds, config, loss=setting.loss)
        if fused is not None:
            kind: Any = NAMED[config.optimizer]
            self.step.optimizer = kind(
                self.step.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=fused
            )
        if compiled:
            model.compile(dynamic=True)

    def inputs(self, batch: Batch) -> Iterable[Any]:
        return (part.inputs for part in self.collate(batch))

    def backward(self, batch: Batch) -> Tensor:
        self.model.zero_grad()
        whole = replace(batch, collate=self.collate)
        with products(self.precision):
            return self.step.objective.backward(whole, self.step.scaler)

    def round(self, batch: Batch) -> None:
        with products(self.precision):
            self.step([replace(batch, collate=self.collate)])


Version = AllTasks | TaskByTask


def adapted(setting: Setting) -> nn.Module:
    """A copy of the model with metalora's layers, each task's parameters drawn at random."""
    model = adapt(deepcopy(setting.model), setting.lora, setting.rounds.num_tasks)
    generator = torch.Generator(setting.device).manual_seed(1)
    for parameter in task_parameters(model):
        nn.init.normal_(parameter, std=0.02, generator=generator)
    return model


def versions(setting: Setting) -> dict[str, Callable[[], Version]]:
    """By name, what makes each version.

    The plain model without adapters and the authors' schedule come in all precisions; metalora's
    versions have one thing more each than the one before.
    """
    found: dict[str, Callable[[], Version]] = {}
    *_, (best, _) = setting.together.items()  # the way that has no padding, if there is one

    def one_task(
        make: Callable[[nn.Module, LoRAConfig, int], Selectable], way: str, precision: str = "fp32"
    ) -> Version:
        what = make(deepcopy(setting.model), setting.lora, setting.rounds.num_tasks)
        return TaskByTask(what, setting.one_task[way], setting.loss, setting.config, precision)

    def ours(way: str, precision: str = "fp32", **keywords: Any) -> Version:
        collate = setting.together[way]()
        return AllTasks(
            *(setting, adapted(setting), collate, precision), packed=way == PACKED, **keywords
        )

    def plain(precision: str) -> Version:
        model, collate = deepcopy(setting.model), setting.together[best]()
        return AllTasks(setting, model, collate, precision, packed=best == PACKED)

    def with_merged(precision: str, **keywords: Any) -> Version:
        model, counts = merged(adapted(setting))
        ready = setting.together[AT_ONCE]()

        def collate(batch: Batch) -> Iterator[Batch]:
            for part in ready(batch):
                assert part.counts is not None
                counts[:] = [*part.counts, *[0] * (setting.rounds.num_tasks - len(part.counts))]
                yield part

        return AllTasks(setting, model, collate, precision, fused=True, **keywords)

    for precision in PRECISIONS:
        found[in_precision(PLAIN, precision)] = partial(plain, precision)
        found[in_precision(AUTHORS, precision)] = partial(one_task, authors, AUTHORS, precision)
        found[in_precision(PEFT, precision)] = partial(one_task, peft, AUTHORS, precision)
    if TO_THE_BATCH in setting.one_task:
        found[TO_THE_BATCH] = partial(one_task, authors, TO_THE_BATCH)
    if setting.lora.dropout == 0:
        for precision in PRECISIONS:
            name = in_precision(MERGED, precision)
            found[name] = partial(with_merged, precision)
            found[f"{name}, compiled"] = partial(with_merged, precision, compiled=True)
    for way in setting.together:
        found[way] = partial(ours, way, fused=False)
    found[FUSED] = partial(ours, best)
    for precision in (FASTER, "bf16"):
        found[f"+ {precision}"] = partial(ours, best, precision)
    found[COMPILED] = partial(ours, best, "bf16", compiled=True)
    return found


def results(version: Version, start: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """A version's loss and gradients, [1 or T, ...] each, at the values of ``start``."""
    values = dict(start.named_parameters())
    if values.keys() != version.parameters.keys():
        different = sorted(values.keys() ^ version.parameters.keys())
        raise GateError(f"not the same parameters: {', '.join(different[:3])}")
    with torch.no_grad():
        for name, found in version.parameters.items():
            parts = values[name].reshape(len(found), *found[0].shape)
            for parameter, value in zip(found, parts, strict=True):
                parameter.copy_(value)
    version.model.eval()
    gradients = {LOSS: version.backward(batch).view(1, 1)}
    for name, found in version.parameters.items():
        each = [torch.zeros_like(p) if p.grad is None else p.grad for p in found]
        gradients[name] = torch.stack(each)
    version.model.zero_grad()
    version.model.train()
    return gradients


class Gate:
    """Compares versions with the plainest one in float64, which is computed once.

    In bfloat16 small sums of large terms are rough in any version, so the error may also be twice
    that of the plainest version in bfloat16.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self._known: dict[tuple[bool, str], dict[str, Tensor]] = {}

    def __call__(self, name: str, version: Version) -> float:
        """The largest relative error ‖got - exact‖ / ‖exact‖ of the loss or any task's gradient.

        Raises:
            GateError: if it is above the tolerance.
        """
        plain, tolerance = name.startswith(PLAIN), TOLERANCE[version.precision]
        exact = self.plainest(plain, "fp64")
        got = results(version, self._start(plain), self.setting.few)
        sizes = [float(g.flatten(1).norm(dim=1).max()) for n, g in exact.items() if n != LOSS]
        floor = FLOOR[version.precision] * max(sizes)
        errors = []
        for part, right in exact.items():
            allowed = tolerance
            if version.precision == "bf16":
                rough = self.plainest(plain, "bf16")[part]
                allowed = max(allowed, 2 * check_parts(part, rough, right, math.inf, floor))
            found = got[part].reshape(right.shape)
            errors.append(check_parts(part, found, right, allowed, floor))
        return max(errors)

    def plainest(self, plain: bool, precision: str) -> dict[str, Tensor]:
        """The results of the authors' schedule, or of the model without adapters if ``plain``."""
        if (plain, precision) not in self._known:
            setting, model, few = self.setting, deepcopy(self.setting.model), self.setting.few
            if precision == "fp64":
                model = model.double()
                if few.inputs.is_floating_point():  # and not samples' numbers
                    few = replace(few, inputs=few.inputs.double())
            if plain:
                what = Selectable(model, lambda task: None, by_name(model))
            else:
                what = authors(model, setting.lora, setting.rounds.num_tasks)
            collate = setting.one_task[AUTHORS]
            version = TaskByTask(what, collate, setting.loss, setting.config, precision)
            self._known[plain, precision] = results(version, self._start(plain), few)
        return self._known[plain, precision]

    def _start(self, plain: bool) -> nn.Module:
        model: nn.Module = self.setting.model
        return model if plain else adapted(self.setting)
