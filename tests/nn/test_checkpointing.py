"""Layers that backward runs again have the tasks of their forward pass, wherever backward runs."""

import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metalora.adapters import LoRAConfig, adapt
from metalora.nn import MultiTaskLoRALinear, current_tasks, keep_tasks, tasks
from tests.pairs import every_pair

A, B, C = torch.tensor([2, 0, 1, 0, 2]), torch.tensor([0, 1, 1, 2, 0]), torch.tensor([1] * 5)


class RunAgain(torch.autograd.Function):
    """A checkpoint that is not torch's."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.random_state = function, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random_state)
            ctx.function(x).backward(grad)
        return None, x.grad


CHECKPOINTS = {
    "reentrant": lambda function, x: checkpoint(function, x, use_reentrant=True),
    "not reentrant": lambda function, x: checkpoint(function, x, use_reentrant=False),
    "nested": lambda function, x: checkpoint(
        lambda y: checkpoint(function, y, use_reentrant=False), x, use_reentrant=False
    ),
    "nested reentrant": lambda function, x: checkpoint(
        lambda y: checkpoint(function, y, use_reentrant=True), x, use_reentrant=True
    ),
    "foreign": lambda function, x: RunAgain.apply(keep_tasks(function), x),
}


class Network(nn.Module):
    def __init__(self, run) -> None:
        super().__init__()
        self.run = run
        self.first, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def block(self, x):
        return torch.tanh(self.body(torch.tanh(x)))

    def forward(self, x):
        return self.head(self.run(self.block, self.first(x)))


def network(run=lambda function, x: function(x), dropout=0.0):
    torch.manual_seed(0)
    model = adapt(Network(run), LoRAConfig(rank=2, dropout=dropout, heads=["head"]), 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def loss_of(model, *batches):
    """The sum of a loss per batch of tasks, all with one input."""
    torch.manual_seed(1)
    x, total = torch.randn(5, 3, 4), 0.0
    for ids in batches:
        with tasks(ids):
            total = total + model(x).square().sum()
    return total


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters()}


def assert_same(got, want):
    assert all(value.abs().sum() > 0 for value in want.values())
    for name, value in got.items():
        assert torch.equal(value, want[name]), name


@every_pair(
    dropout=[0.0, 0.3],
    run=CHECKPOINTS,
    around=[None, C],
)
def test_backward_runs_layers_again_with_the_tasks_of_their_forward(run, around, dropout):
    want, model = network(dropout=dropout), network(CHECKPOINTS[run], dropout)
    loss_of(want, A, B).backward()
    loss = loss_of(model, A, B)
    with nullcontext() if around is None else tasks(around):
        loss.backward()
    assert_same(gradients(model), gradients(want))
    assert current_tasks() is None


@pytest.mark.parametrize("run", CHECKPOINTS)
def test_backward_in_another_thread_does_too(run):
    """As on a GPU, where autograd runs backward in a thread of its own."""
    want, model = network(), network(CHECKPOINTS[run])
    loss_of(want, A).backward()
    loss = loss_of(model, A)

    def backward():
        with tasks(C):
            loss.backward()

    thread = threading.Thread(target=backward)
    with tasks(B):
        thread.start()
        thread.join()
    assert_same(gradients(model), gradients(want))


@pytest.mark.parametrize("run", ["not reentrant", "reentrant"])
def test_a_retained_graph_keeps_its_tasks(run):
    want, model = network(), network(CHECKPOINTS[run])
    for candidate in (want, model):
        loss = loss_of(candidate, A)
        loss.backward(retain_graph=True)
        loss_of(candidate, B).backward()
        loss.backward()
    assert_same(gradients(model), gradients(want))


@pytest.mark.parametrize("run", ["not reentrant", "reentrant"])
def test_a_layer_that_needed_no_tasks_is_not_given_those_around_backward(run):
    layer = MultiTaskLoRALinear(4, 4, num_tasks=1, rank=1)
    x = torch.randn(5, 4, requires_grad=True)
    y = CHECKPOINTS[run](layer, x)
    with tasks(C):
        y.sum().backward()
    assert layer.lora_B.grad.abs().sum() > 0


def test_a_foreign_checkpoint_does_not_use_the_tasks_around_backward():
    model = network(lambda function, x: RunAgain.apply(function, x))
    loss = loss_of(model, A)
    message = r"inside backward\(\) .* in metalora\.nn\.keep_tasks"
    with pytest.raises(RuntimeError, match=message), tasks(A):
        loss.backward()
    with pytest.raises(ValueError, match="which task does each sample belong to"):
        loss_of(model, A).backward()


@pytest.mark.parametrize("run", ["not reentrant", "reentrant"])
def test_an_error_in_a_checkpoint_leaves_no_tasks_behind(run):
    def fail_in_backward(x):
        if torch._C._current_graph_task_id() != -1:
            raise ZeroDivisionError
        return x.sin()

    x = torch.randn(3, requires_grad=True)
    with tasks(A) as batch:
        with pytest.raises(ZeroDivisionError):
            CHECKPOINTS[run](fail_in_backward, x).sum().backward()
        assert current_tasks() is batch
    assert current_tasks() is None


@pytest.mark.slow
def test_a_checkpoint_inside_a_compiled_model_has_its_tasks():
    torch._dynamo.reset()
    want, model = network(), network(CHECKPOINTS["not reentrant"])
    loss_of(want, A, B).backward()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    loss = loss_of(compiled, A, B)
    with tasks(C):
        loss.backward()
    for name, got in gradients(model).items():
        torch.testing.assert_close(got, gradients(want)[name], msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("run", ["not reentrant", "reentrant"])
def test_a_checkpointed_compiled_block_has_its_tasks(run):
    torch._dynamo.reset()
    want, model = network(), network(CHECKPOINTS[run])
    loss_of(want, A, B).backward()
    model.body = torch.compile(model.body, backend="aot_eager", fullgraph=True)
    loss = loss_of(model, A, B)
    with tasks(C):
        loss.backward()
    for name, got in gradients(model).items():
        wanted = gradients(want)[name.replace("_orig_mod.", "")]
        torch.testing.assert_close(got, wanted, msg=name)
