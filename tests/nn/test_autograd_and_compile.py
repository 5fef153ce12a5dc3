"""The ambient tasks reach layers that autograd runs again, and compiled ones."""

import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metalora.adapters import LoRAConfig, adapt
from metalora.nn import TaskBatch, current_tasks, tasks


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.body, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def block(self, x):
        return torch.tanh(self.body(torch.tanh(x)))

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head(x)


def gradients(reentrant, dropout=0.0):
    torch.manual_seed(0)
    model = Checkpointed(reentrant)
    adapt(model, LoRAConfig(rank=2, dropout=dropout, heads=["head"]), 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    x = torch.randn(5, 3, 4)
    torch.manual_seed(1)
    with tasks(torch.tensor([2, 0, 1, 0, 2])):
        model(x).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_find_their_tasks_in_backward(reentrant, dropout):
    want = gradients(None, dropout)
    for name, got in gradients(reentrant, dropout).items():
        assert torch.equal(got, want[name]), name


def test_backward_outside_the_context_is_explained():
    model = adapt(Checkpointed(False), LoRAConfig(rank=1), 2)
    with tasks(torch.tensor([0, 1])):
        loss = model(torch.randn(2, 4)).sum()
    with pytest.raises(ValueError, match=r"call backward\(\) inside it too"):
        loss.backward()


class AskInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, found):
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.found.append(current_tasks())
        with tasks(torch.tensor([0])) as inner:
            ctx.found.append(current_tasks() is inner)
        return grad, None


def test_a_backward_in_another_thread_sees_the_tasks():
    """As on a GPU, where autograd runs backward in a thread of its own."""
    x, found = torch.ones(2, requires_grad=True), []
    with tasks(torch.tensor([1])) as batch:
        y = AskInBackward.apply(x, found).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
        assert current_tasks() is batch
    assert found == [batch, True]


def native_available() -> bool:
    try:
        from metalora._library import native_available as available
    except ImportError:
        return False
    return bool(available())


@pytest.mark.skipif(not native_available(), reason="the reference asks task_ptr for its values")
@pytest.mark.parametrize(("route", "dropout"), [("auto", 0.0), ("token", 0.0), ("token", 0.3)])
def test_compiles_whole_and_once_for_all_batches(route, dropout):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    adapt(model, LoRAConfig(rank=2, dropout=dropout, heads=["2"], route=route), 3)
    model.train(dropout > 0)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)

    def run(ids):
        x = torch.randn(len(ids), 2, 6)
        with tasks(torch.tensor(ids)):
            y = compiled(x)
            y.sum().backward()
            if dropout == 0:
                torch.testing.assert_close(y, model(x))

    run([2, 0, 1, 0])
    run([0, 2, 0, 1])
    run([1, 0, 0, 0])
    assert counter.frame_count == 1, "recompiled for other task ids"
    for ids in ([1, 0, 2, 2, 2, 0], [1, 0, 2, 2, 0, 1, 1], [2, 1, 0], [2, 0] * 8):
        run(ids)
    assert counter.frame_count == 2, "recompiled more than once for other batch sizes"


def test_explicit_batches_are_independent_of_threads():
    layer = adapt(nn.Sequential(nn.Linear(3, 2)), LoRAConfig(rank=1), 2)[0]
    x, batch, results = torch.randn(2, 3), TaskBatch(torch.tensor([1, 0])), []
    thread = threading.Thread(target=lambda: results.append(layer(x, batch)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], layer(x, batch))
