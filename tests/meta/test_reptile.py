"""Reptile against the same written out by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.meta import Callback, RoundLoader, TrainConfig, by_task, reptile
from tests.pairs import every_pair


def rounds():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0] * 20 + [1] * 12)  # task 1 is through after three of five rounds
    inputs = torch.randn(32, 4, generator=generator, dtype=torch.float64)
    return RoundLoader(inputs, (inputs[:, 0] > 0).long(), ids, batch_size=4, seed=2)


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2)).double()


def by_hand(epochs, inner_steps, inner_optimizer, outer, sign, average):
    """The definition: deep copies, the outer optimiser fed with W − W_inner."""
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    model, source, steps = network(), rounds(), 0
    optimizer = kinds[outer](model.parameters(), lr=0.05, weight_decay=0.01)
    for epoch in range(epochs):
        source.set_epoch(epoch)
        batches = list(source)
        for start in range(0, len(batches), inner_steps):
            solutions = []
            for task in (0, 1):
                parts = [p for b in batches[start : start + inner_steps] for p in b.by_task()]
                parts = [p for p in parts if p.task_ids[0] == task]
                if not parts:
                    continue
                inner = copy.deepcopy(model)
                options = {"weight_decay": 0.0}
                inner_step = kinds[inner_optimizer](inner.parameters(), lr=0.1, **options)
                for part in parts:
                    inner_step.zero_grad()
                    F.cross_entropy(inner(part.inputs), part.targets).backward()
                    inner_step.step()
                solutions.append(inner)
                if not average:
                    outer_step(model, optimizer, [inner], sign)
                    steps += 1
            if average:
                outer_step(model, optimizer, solutions, sign)
                steps += 1
    return model, steps


def outer_step(model, optimizer, solutions, sign):
    for number, parameter in enumerate(model.parameters()):
        inner = [list(solution.parameters())[number].detach() for solution in solutions]
        parameter.grad = sign * (parameter.detach() - sum(inner) / len(inner))
    optimizer.step()


@every_pair(
    average=[False, True],
    outer=["adam", "sgd"],
    inner=["sgd", "adam", "adamw"],
    sign=["towards", "away"],
)
def test_equals_the_definition(sign, inner, outer, average):
    model = network()
    seen = []
    reptile(
        model,
        rounds(),
        TrainConfig(epochs=2, lr=0.05, weight_decay=0.01, optimizer=outer),
        inner_steps=2,
        inner_lr=0.1,
        inner_optimizer=inner,
        outer_sign=sign,
        average=average,
        callbacks=[CountSteps(seen)],
    )
    want, steps = by_hand(2, 2, inner, outer, 1.0 if sign == "towards" else -1.0, average)
    for got, wanted in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert len(seen) == steps
    assert seen[0] * 2 == steps


class Wrapped:
    """A loader of a user's own, which does not say in what order it draws."""

    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        if name == "order":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        return iter(self.loader)


def test_no_epoch_has_more_steps_than_were_foretold():
    ids = torch.repeat_interleave(torch.arange(3), torch.tensor([2, 30, 7]))
    x = torch.randn(39, 4, dtype=torch.float64)
    for wrap in (lambda loader: loader, Wrapped, by_task):
        loader = RoundLoader(x, ids % 2, ids, batch_size=6, order="proportional")
        seen = []
        config = TrainConfig(epochs=1, lr=0.1, optimizer="sgd")
        reptile(
            network(), wrap(loader), config, inner_steps=2, inner_lr=0.1,
            callbacks=[CountSteps(seen)],
        )  # fmt: skip
        assert len(seen) <= seen[0]


class CountSteps(Callback):
    def __init__(self, seen):
        self.seen = seen

    def on_step(self, training, loss):
        self.seen.append(training.steps_per_epoch)


def test_sgd_with_rate_one_on_one_task_is_the_inner_training_itself():
    source = rounds()
    first = source.task_ids == 0
    source = RoundLoader(
        source.inputs[first], source.targets[first], source.task_ids[first], batch_size=4, seed=2
    )
    model, plain = network(), network()
    config = TrainConfig(epochs=1, lr=1.0, optimizer="sgd")
    reptile(model, source, config, inner_steps=3, inner_lr=0.1)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for batch in source:
        optimizer.zero_grad()
        F.cross_entropy(plain(batch.inputs), batch.targets).backward()
        optimizer.step()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_running_statistics_go_on_through_inner_steps():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).double()
    reptile(model, rounds(), TrainConfig(epochs=1, lr=0.01), inner_steps=2)
    assert model[1].num_batches_tracked == 8  # 5 batches of task 0 and 3 of task 1


def test_an_interrupt_within_the_inner_steps_leaves_the_outer_weights():
    model, calls = network(), []
    before = [p.detach().clone() for p in model.parameters()]

    def forward(model, inputs):
        calls.append(len(inputs))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return model(inputs)

    config = TrainConfig(epochs=1, lr=0.05, optimizer="sgd")
    with pytest.raises(KeyboardInterrupt):
        reptile(model, rounds(), config, inner_steps=5, inner_lr=0.1, forward=forward)
    for parameter, start in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, start)
