"""TaskOptimizer against an optimiser per task, and everything a user's own loop does with it."""

import random
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metalora
from metalora import LoRAConfig, TaskOptimizer, adapt, task_parameters, tasks

T, D, CLASSES = 4, 5, 3
LORA = LoRAConfig(rank=2, alpha=3, heads=["2"])
KINDS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.02, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1, lr_decay=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.01, weight_decay=0.02),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01, weight_decay=0.02),  # not elementwise
}


def network(dtype=torch.float64, config=LORA, num_tasks=T):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)
    adapt(model, config, num_tasks)
    for parameter in task_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def batches(count, seed=0, first_complete=0):
    """Ragged batches in any order, of which all but the first few lack some tasks."""
    source = random.Random(seed)
    made = []
    for number in range(count):
        present = list(range(T)) if number < first_complete else source.sample(range(T), 2)
        ids = [t for t in present for _ in range(source.randint(1, 4))]
        source.shuffle(ids)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(len(ids), D, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (len(ids),), generator=generator)
        made.append((x, y, torch.tensor(ids)))
    return made


def backward(model, batch, scale=1.0):
    x, y, ids = batch
    with tasks(ids):
        losses = F.cross_entropy(model(x.to(next(model.parameters()))), y, reduction="none")
    (metalora.task_mean(losses, ids) * scale).backward()


def train(model, optimizer, data):
    for batch in data:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def make(model, kind, **options):
    options = {**KINDS[kind].keywords, **options}
    return TaskOptimizer(model, KINDS[kind].func, **options)


class Separate:
    """An optimiser of torch for the shared parameters, and one for each task."""

    def __init__(self, model, make_optimizer):
        own = {id(p) for p in task_parameters(model)}
        leaf = lambda tensor: tensor.detach().clone().requires_grad_()  # noqa: E731
        self.shared = {n: leaf(p) for n, p in model.named_parameters() if id(p) not in own}
        self.own = [
            {n: leaf(p[t]) for n, p in model.named_parameters() if id(p) in own} for t in range(T)
        ]
        parts = [part for part in [self.shared, *self.own] if part]
        self.optimizers = [make_optimizer(list(part.values())) for part in parts]

    def step(self, model, present):
        """One step with the model's gradients, of those tasks that are present."""
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if name in self.shared:
                self.shared[name].grad = None if grad is None else grad.clone()
                continue
            for task, part in enumerate(self.own):
                have = grad is not None and task in present
                part[name].grad = grad[task].clone() if have else None
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self, model, tolerance=0.0):
        for name, parameter in model.named_parameters():
            want = self.shared.get(name)
            if want is None:
                want = torch.stack([part[name] for part in self.own])
            torch.testing.assert_close(parameter, want, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("complete", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_optimiser_per_task(kind, complete):
    model = network()
    plain = {} if kind == "adafactor" else {"foreach": False}
    separate = Separate(model, partial(KINDS[kind], **plain))
    optimizer = make(model, kind, **plain)
    for x, y, ids in batches(20, first_complete=complete):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model)


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_fused_kernels_equal_it_too(kind):
    model = network()
    separate, optimizer = Separate(model, KINDS[kind]), make(model, kind)
    assert optimizer.param_groups[0]["fused"]
    for x, y, ids in batches(20, first_complete=3):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model, 1e-15)


def test_the_comparison_would_notice_a_plain_optimiser():
    model = network()
    separate = Separate(model, KINDS["adamw"])
    optimizer = KINDS["adamw"](model.parameters())
    for x, y, ids in batches(4):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(AssertionError):
        separate.check(model, 1e-6)


def own_state(optimizer, model, task):
    """A task's adapters and heads, and what the optimiser keeps of them."""
    found = []
    for parameter in task_parameters(model):
        state = optimizer.state[parameter]
        found += [parameter[task].detach().clone()]
        found += [value[task].clone() for key, value in state.items()]
    return found
