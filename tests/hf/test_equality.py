"""One round through the batched path gives the loss and gradients of a loop over the tasks.

The loop runs one sequence after the other through a plain model with transformers' own attention,
adds A_t and B_t by itself, and shares no code with metalora but the dropout mask.
"""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metalora
from metalora import ops
from metalora.adapters import adapted_layers
from metalora.hf import SequencePasses, enable_packing, position_offset
from metalora.meta import Batch, TrainConfig
from metalora.meta.steps import Objective
from metalora.nn import MultiTaskLoRALinear
from tests.hf.models import PAD, roberta, sequences
from tests.pairs import every_pair

T, N, P = 3, 2, 0.25  # tasks, candidates of a sample, dropout
TASKS = torch.tensor([0, 0, 0, 1, 2, 2])  # of 6 samples
ANSWERS = torch.tensor([0, 1, 1, 0, 1, 0])
LENGTHS = [3, 5, 9, 2, 6, 6, 4, 11, 1, 3, 7, 2]  # of their candidates
SEQUENCES = sequences(LENGTHS, N)
CONFIG = metalora.LoRAConfig(
    rank=2, alpha=3, target_modules=r".*\.encoder\.layer\..*", heads=["classifier.out_proj"]
)


def spread(masks, x):
    """The masks [length, H] of sequences as x has their tokens: packed, padded, first ones only."""
    if x.dim() == 2 or x.shape[1] == 1:
        return torch.stack([mask[0] for mask in masks]).view_as(x)
    if len(x) == 1:
        return torch.cat(masks)[None]
    return nn.utils.rnn.pad_sequence(masks, batch_first=True)


def gathered(keep, lengths):
    """Undoes `spread` for the rows of a layer's x; what was not computed stays unmasked."""
    if len(keep) == len(lengths):
        parts = keep.split(1)
    elif len(keep) == sum(lengths):
        parts = keep.split(lengths)
    else:
        padded = keep.view(len(lengths), -1, keep.shape[1])
        parts = [part[:length] for part, length in zip(padded, lengths, strict=True)]
    rest = [part.new_ones(n - len(part), part.shape[1]) for part, n in zip(parts, lengths)]  # noqa: B905
    return [torch.cat(pair) for pair in zip(parts, rest, strict=True)]


class GivenDropout(nn.Module):
    """Dropout with given masks: of every sequence, for those that ``layout`` numbers."""

    def __init__(self, masks, layout):
        super().__init__()
        self.masks, self.layout = masks, layout

    def forward(self, x):
        return x * spread([self.masks[i] for i in self.layout], x) / (1 - P)


class Round:
    """The round in the batched path, and the masks that it used."""

    def __init__(self, route, dropout, packed):
        p = P if dropout else 0.0
        self.model = roberta(hidden_dropout_prob=p, attention_probs_dropout_prob=0.0).train()
        metalora.adapt(self.model, replace(CONFIG, route=route, dropout=p), T)
        for layer in adapted_layers(self.model).values():
            for parameter in layer.own_task_parameters().values():
                nn.init.normal_(parameter, std=0.3)
        if packed:
            enable_packing(self.model)
        self.packed, self.passes = packed, 0
        self.layout = []  # numbers of the sequences in the current pass
        self.dropouts = {}  # of plain dropouts: each sequence's mask, by name
        self.branches = {}  # of adapters: each sequence's mask, by name

    def give_masks(self, monkeypatch):
        for name, module in list(self.model.named_modules()):
            if isinstance(module, nn.Dropout) and module.p > 0:
                self.dropouts[name] = [torch.rand(length, 32) >= P for length in LENGTHS]
                given = GivenDropout(self.dropouts[name], self.layout)
                self.model.set_submodule(name, given)
        inside, original = [], ops.lora_linear
        for name, layer in adapted_layers(self.model).items():
            layer.register_forward_pre_hook(lambda module, args, name=name: inside.append(name))

        def seeded(x, *args, **options):
            seed = len(inside)
            masks = gathered(ops.dropout_mask(seed, P, *x.shape), [LENGTHS[i] for i in self.layout])
            known = self.branches.setdefault(inside[-1], {})
            known |= dict(zip(self.layout, masks, strict=True))
            return original(x, *args, seed=seed, **options)

        monkeypatch.setattr(ops, "lora_linear", seeded)

    def run(self, max_tokens):
        """Loss and gradients, as training takes them."""
        passes = SequencePasses(
            SEQUENCES,
            packed=self.packed,
            max_tokens=max_tokens,
            pad_token_id=PAD,
            position_offset=position_offset(self.model),
        )

        def collate(batch):
            for part in passes(batch):
                self.passes += 1
                self.layout[:] = [s * N + c for s in part.targets.tolist() for c in range(N)]
                yield part

        def loss(logits, batch):  # the targets are the samples' numbers
            labels = (torch.arange(N) == ANSWERS[batch.targets][:, None]).long()
            losses = F.cross_entropy(logits, labels.flatten(), reduction="none")
            return losses.view(-1, N).mean(1)

        counts = tuple(torch.bincount(TASKS).tolist())
        samples = torch.arange(len(TASKS))
        batch = Batch(samples, samples, TASKS, counts, collate=collate)
        objective = Objective(self.model, TrainConfig(epochs=1, lr=1), loss=loss)
        value = objective.backward(batch, torch.amp.GradScaler("cpu", enabled=False))
        return value, {name: p.grad for name, p in self.model.named_parameters()}


class PlainLoRA(nn.Module):
    """y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ."""

    def __init__(self, weight, bias, a, b):
        super().__init__()
        self.parts, self.mask = (weight, bias, a, b), None

    def forward(self, x):
        weight, bias, a, b = self.parts
        branch = x if self.mask is None else x * self.mask / (1 - P)
        return x @ weight.T + bias + 1.5 * branch @ a[self.task].T @ b[self.task].T


class Loop:
    """The same round, task after task and sequence after sequence."""

    def __init__(self, batched):
        self.branches, self.layout = batched.branches, []
        named = batched.model.named_parameters()
        self.leaves = {n: p.detach().clone().requires_grad_() for n, p in named}
        self.plain = roberta(attn_implementation="eager", hidden_dropout_prob=0.0).eval()
        for name, masks in batched.dropouts.items():
            self.plain.set_submodule(name, GivenDropout(masks, self.layout))
        self.adapted = {}
        for name, layer in adapted_layers(batched.model).items():
            if isinstance(layer, MultiTaskLoRALinear):
                parts = ("weight", "bias", "lora_A", "lora_B")
                self.adapted[name] = PlainLoRA(*(self.leaves[f"{name}.{p}"] for p in parts))
                self.plain.set_submodule(name, self.adapted[name])

    def run(self):
        losses = []
        for task in range(T):
            samples = (TASKS == task).nonzero()[:, 0].tolist()  # noqa: SIM300
            numbers = [s * N + c for s in samples for c in range(N)]
            labels = [int(ANSWERS[number // N] == number % N) for number in numbers]
            logits = torch.cat([self.logits(task, number) for number in numbers])
            losses.append(F.cross_entropy(logits, torch.tensor(labels)))
        value = sum(losses) / T
        value.backward()
        return value.detach(), {name: leaf.grad for name, leaf in self.leaves.items()}

    def logits(self, task, number):
        self.layout[:] = [number]
        for name, layer in self.adapted.items():
            layer.task = task
            layer.mask = self.branches[name][number] if self.branches else None
        own = {name: self.leaves[name] for name, _ in self.plain.named_parameters()}
        for name in ("classifier.out_proj.weight", "classifier.out_proj.bias"):
            own[name] = own[name][task]
        start, end = SEQUENCES.starts[number : number + 2]
        ids = SEQUENCES.fields["input_ids"][start:end].long()[None]
        return torch.func.functional_call(self.plain, own, kwargs={"input_ids": ids}).logits


def without_native_kernels(monkeypatch):
    for name in ("lora_linear", "dropout"):
        module = sys.modules[f"metalora.ops.{name}"]
        monkeypatch.setattr(module, "usable", lambda tensor: False)


@every_pair(
    dropout=[False, True],
    max_tokens=[10_000, 25],
    packed=[True, False],
    kernels=[True, False],
)
def test_a_round_at_once_equals_the_loop(kernels, packed, max_tokens, dropout, monkeypatch):
    if not kernels:
        without_native_kernels(monkeypatch)
    batched = Round("auto", dropout, packed)
    if dropout:
        batched.give_masks(monkeypatch)
    result = batched.run(max_tokens)
    assert (batched.passes == 1) == (max_tokens > 1000)
    assert_equal(result, Loop(batched).run())


@pytest.mark.parametrize("route", ["weight", "token"])
def test_every_route_equals_the_loop(native, route):
    batched = Round(route, dropout=False, packed=True)
    assert_equal(batched.run(10_000), Loop(batched).run())


def test_the_comparison_would_notice_a_wrong_task_and_a_wrong_mask(monkeypatch):
    batched = Round("auto", dropout=True, packed=True)
    batched.give_masks(monkeypatch)
    result, loop = batched.run(10_000), Loop(batched)
    name = next(iter(loop.adapted))
    masks = batched.branches[name]
    masks[0], kept = ~masks[0], masks[0]
    with pytest.raises(AssertionError):
        assert_equal(result, loop.run())
    masks[0], loop = kept, Loop(batched)
    loop.leaves[f"{name}.lora_A"].data.copy_(loop.leaves[f"{name}.lora_A"].flip(0))
    with pytest.raises(AssertionError):
        assert_equal(result, loop.run())


def assert_equal(result, wanted):
    torch.testing.assert_close(result[0], wanted[0], rtol=1e-13, atol=0)
    assert result[1].keys() == wanted[1].keys()
    for name, gradient in result[1].items():
        limit = 1e-12 * float(wanted[1][name].abs().max()) + 1e-15
        assert float((gradient - wanted[1][name]).abs().max()) <= limit, name
