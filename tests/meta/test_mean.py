"""task_mean against equation 5, written out task by task."""

import re

import pytest
import torch
from torch import nn

from metalora import LoRAConfig, adapt, task_mean, tasks
from metalora.meta import cross_entropy
from metalora.meta.data import Batch
from metalora.meta.mean import sample_weights, weighted_mean
from metalora.nn import TaskBatch

IDS = [
    [0] * 9 + [1],
    [3, 0, 7, 3, 3, 0, 100_000],
    [2],
    [5, 5, 5],
]


def equation_5(losses, ids):
    """1/|S| Σ_t 1/n_t Σ_i losses[i], in plain Python."""
    of_task = {}
    for loss, task in zip(losses, ids, strict=True):
        of_task.setdefault(task, []).append(loss)
    return sum(sum(part) / len(part) for part in of_task.values()) / len(of_task)


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_equals_equation_5(ids):
    torch.manual_seed(0)
    losses = torch.rand(len(ids), dtype=torch.float64)
    found = task_mean(losses, torch.tensor(ids))
    assert float(found) == pytest.approx(equation_5(losses.tolist(), ids), rel=1e-14)
    assert torch.equal(found, task_mean(losses, TaskBatch(torch.tensor(ids))))
    assert torch.equal(found, weighted_mean(losses, sample_weights(torch.tensor(ids))))


@pytest.mark.parametrize("ids", IDS, ids=str)
def test_samples_count_by_their_sizes(ids):
    """A sample of size n is as n samples of size 1."""
    torch.manual_seed(0)
    losses, sizes = torch.rand(len(ids), dtype=torch.float64), torch.randint(1, 5, (len(ids),))
    task_ids = torch.tensor(ids)
    found = task_mean(losses, task_ids, sizes=sizes)
    wanted = task_mean(losses.repeat_interleave(sizes), task_ids.repeat_interleave(sizes))
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    assert torch.equal(found, task_mean(losses, TaskBatch(task_ids), sizes=sizes))
    equal = task_mean(losses, task_ids, sizes=torch.full_like(sizes, 3))
    torch.testing.assert_close(equal, task_mean(losses, task_ids), rtol=1e-14, atol=0)


def test_a_task_without_size_is_not_present():
    losses, ids = torch.tensor([2.0, 4.0, 6.0]), torch.tensor([0, 1, 1])
    found = task_mean(losses, ids, sizes=torch.tensor([0, 1, 3]))
    assert float(found) == pytest.approx(4 / 4 + 3 * 6 / 4)
    assert float(task_mean(losses, ids, sizes=torch.zeros(3))) == 0


def test_tasks_count_the_same_whatever_their_samples():
    losses, ids = torch.tensor([0.0] * 9 + [1.0]), torch.tensor([0] * 9 + [1])
    assert losses.mean() == pytest.approx(0.1)
    assert task_mean(losses, ids) == pytest.approx(0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_added_up_in_float32(dtype):
    ids = torch.arange(3000) % 3
    losses = torch.full((3000,), 1.5, dtype=dtype, requires_grad=True)
    found = task_mean(losses, ids)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found.detach()) == pytest.approx(1.5, rel=1e-6)
    found.backward()
    assert losses.grad.dtype == dtype


def test_an_empty_batch_adds_nothing():
    losses = torch.zeros(0, requires_grad=True)
    found = task_mean(losses, torch.zeros(0, dtype=torch.int64))
    assert found == 0
    found.backward()
    assert losses.grad.shape == (0,)


def test_the_loops_gradient_is_that_of_equation_5():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    adapt(model, LoRAConfig(rank=2, heads=["2"]), 4)
    nn.init.normal_(model[0].lora_B)
    x, y = torch.randn(9, 4, dtype=torch.float64), torch.randint(3, (9,))
    ids = torch.tensor([3, 0, 0, 1, 0, 3, 0, 0, 0])
    with tasks(ids):
        losses = cross_entropy(model(x), Batch(x, y, ids))
    task_mean(losses, ids).backward()
    found = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    per_task = []
    for task in (0, 1, 3):
        mine = ids == task
        layer, head = model[0], model[2]
        weight = layer.weight + layer.lora_B[task] @ layer.lora_A[task]
        logits = torch.tanh(x[mine] @ weight.T + layer.bias)
        logits = logits @ head.weight[task].T + head.bias[task]
        per_task.append(-logits.log_softmax(1)[torch.arange(int(mine.sum())), y[mine]].mean())
    (sum(per_task) / 3).backward()
    for got, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=0, atol=1e-13)


def test_compiles_whole():
    compiled = torch.compile(task_mean, backend="eager", fullgraph=True)
    losses, ids = torch.rand(6), torch.tensor([1, 0, 1, 1, 4, 0])
    assert torch.equal(compiled(losses, ids), task_mean(losses, ids))


FOUR = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("losses", "ids", "error", "message"),
    [
        (torch.tensor(1.0), FOUR, ValueError, "[B=4], got a scalar; pass reduction='none'"),
        (torch.zeros(4, 2), FOUR, ValueError, "losses must be one per sample, [B=4], got [4, 2]"),
        (torch.zeros(3), FOUR, ValueError, "losses must be one per sample, [B=4], got [3]"),
        (torch.zeros(4), FOUR[None], ValueError, "task_ids must be [B], got [1, 4]"),
        (torch.zeros(4), FOUR.int(), TypeError, "task_ids must be int64 [B] or a TaskBatch, got"),
        (torch.zeros(4), [0, 0, 0, 0], TypeError, "or a TaskBatch, got list"),
        (FOUR, FOUR, TypeError, "losses must be a floating-point tensor [B], got torch.int64"),
        (torch.zeros(4), FOUR - 1, ValueError, "task_ids must not be negative, got -1; leave"),
        (0.5, FOUR, TypeError, "losses must be a floating-point tensor [B], got float"),
        (torch.zeros(4), FOUR.to("meta"), ValueError, "task_ids must be on cpu as losses are"),
    ],
)
def test_wrong_arguments_are_named(losses, ids, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        task_mean(losses, ids)
    assert str(caught.value).startswith("task_mean: ") and "\n" not in str(caught.value)


def test_sizes_are_one_per_sample():
    with pytest.raises(ValueError, match=re.escape("sizes must be one per sample, [B=3], got [2]")):
        task_mean(torch.ones(3), torch.tensor([0, 1, 1]), sizes=torch.ones(2))


def test_sizes_are_not_brought_to_the_host():
    """Ids on the CPU go to where the sizes are."""
    ids = torch.tensor([0, 1, 1])
    for order in (None, ids):
        assert sample_weights(ids, order, torch.ones(3, device="meta")).device.type == "meta"
