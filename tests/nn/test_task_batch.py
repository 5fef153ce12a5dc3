"""Which sample belongs to which task: ids of any order, pointers and ranges."""

import re

import pytest
import torch
from torch import nn

from metalora.nn import MultiTaskHead, MultiTaskLoRALinear, TaskBatch, current_tasks, tasks
from tests.pairs import every_pair


def test_pointer_counts_the_rows_of_each_task_and_knows_empty_ones():
    batch = TaskBatch(torch.tensor([3, 0, 3, 1, 0, 0]))
    assert batch.task_ptr(5, 1).tolist() == [0, 3, 4, 4, 6, 6]
    assert batch.task_ptr(5, 7).tolist() == [0, 21, 28, 28, 42, 42]


def test_ids_are_copied_to_a_device_once():
    batch, meta = TaskBatch(torch.tensor([1, 0])), torch.device("meta")
    assert batch.ids_on(torch.device("cpu")) is batch.task_ids
    assert batch.ids_on(meta).is_meta
    assert batch.ids_on(meta) is batch.ids_on(meta)
    assert batch.in_task_order().ids_on(torch.device("cpu")).tolist() == [0, 1]


def test_sort_is_stable_and_unsort_undoes_it():
    ids = torch.tensor([2, 0, 2, 1, 0])
    batch = TaskBatch(ids)
    samples = torch.arange(5.0)[:, None]
    assert batch.sort(samples).flatten().tolist() == [1, 4, 3, 0, 2]
    assert torch.equal(batch.unsort(batch.sort(samples)), samples)


def test_permuting_is_differentiable_twice():
    batch = TaskBatch(torch.tensor([2, 0, 2, 1, 0]))
    samples = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    for permute in (batch.sort, batch.unsort):
        assert torch.autograd.gradcheck(permute, samples)
        assert torch.autograd.gradgradcheck(permute, samples)


def test_sorted_batch_keeps_no_permutation():
    samples = torch.randn(4, 2)
    batch = TaskBatch(torch.tensor([0, 0, 1, 3]))
    assert batch.order is None
    assert batch.sort(samples) is samples
    assert TaskBatch(torch.tensor([1, 0])).order is not None


def test_pointer_of_packed_samples_counts_their_rows():
    batch = TaskBatch(torch.tensor([0, 0, 2, 3]), lengths=[3, 1, 0, 4])
    assert batch.task_ptr(5, None).tolist() == [0, 4, 4, 4, 8, 8]
    assert batch.packed_ids(torch.device("cpu")).tolist() == [0, 0, 0, 0, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([1, 0], [2, 2], "lengths need task_ids that ascend, on the CPU or with counts"),
        ([0, 1], [2], "[B=2] numbers >= 0, got 1 numbers from 2"),
        ([0, 1], [2, -1], "[B=2] numbers >= 0, got 2 numbers from -1"),
    ],
)
def test_bad_lengths_are_refused(ids, lengths, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskBatch(torch.tensor(ids), lengths=lengths)


def test_pointer_is_made_once_per_batch():
    batch = TaskBatch(torch.tensor([0, 1]))
    assert batch.task_ptr(2, 3) is batch.task_ptr(2, 3)


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (
            [0, 1],
            TypeError,
            "must be an int64 tensor [B], or an int for samples of one task, got list",
        ),
        (torch.tensor([0.0, 1.0]), TypeError, "int64 [B], got torch.float32; use task_ids.long()"),
        (torch.zeros(2, requires_grad=True), TypeError, "int64 [B], got torch.float32"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "int64 [B], got torch.int32"),
        (torch.tensor([True]), TypeError, "int64 [B], got torch.bool"),
        (torch.tensor([[0, 1]]), ValueError, "must be [B], got shape [1, 2]"),
        (torch.tensor(0), ValueError, "must be [B], got shape []"),
    ],
)
def test_bad_task_ids_are_refused(ids, error, message):
    with pytest.raises(error) as caught:
        TaskBatch(ids)
    assert message in str(caught.value)
    assert current_tasks() is None


@pytest.mark.parametrize(("ids", "wrong"), [([0, 3, 1], 3), ([0, -1], -1)])
def test_ids_out_of_range_are_refused_early_or_by_the_layer(ids, wrong):
    with pytest.raises(ValueError, match=rf"0\.\.2, as there are 3 tasks, got {wrong}"):
        TaskBatch(torch.tensor(ids), 3)
    layer = MultiTaskLoRALinear(2, 2, num_tasks=3, rank=1)
    with pytest.raises(ValueError, match=rf"0\.\.2, as there are 3 tasks, got {wrong}"):
        layer(torch.zeros(len(ids), 2), TaskBatch(torch.tensor(ids)))


def test_counts_say_the_same_as_sorted_ids():
    ids = torch.tensor([0, 0, 2, 2, 2])
    counted, found = TaskBatch(ids, counts=(2, 0, 3)), TaskBatch(ids)
    assert counted.order is None
    for num_tasks in (3, 5):
        wanted = found.task_ptr(num_tasks, 4)
        assert torch.equal(counted.task_ptr(num_tasks, 4), wanted)
        assert wanted.device.type == "cpu"


def test_ids_need_not_be_on_the_host_where_counts_are():
    batch = TaskBatch(torch.empty(5, dtype=torch.int64, device="meta"), counts=(2, 3))
    assert batch.task_ptr(2, 1).tolist() == [0, 2, 5]


@pytest.mark.parametrize("counts", [(1, 1, 1), (1, 2), (2, 1), (4, -1), ()])
def test_wrong_counts_are_refused(counts):
    with pytest.raises(ValueError, match=r"counts must say how many of the \[B=3\] ascending"):
        TaskBatch(torch.tensor([0, 1, 0]), counts=counts)


def test_counts_of_more_tasks_than_there_are_are_refused():
    batch = TaskBatch(torch.tensor([0, 1]), counts=(1, 1, 0))
    with pytest.raises(ValueError, match=r"counts must be at most 2 numbers.*got 3"):
        batch.task_ptr(2, 1)


@pytest.mark.parametrize("values", [[0, 0, 1, 2], [2, 0, 1, 0]], ids=["sorted", "mixed"])
def test_the_ids_are_copied(values):
    ids = torch.tensor(values)
    batch, samples = TaskBatch(ids), torch.randn(4, 2)
    want = batch.sort(samples)
    ids.fill_(1)
    assert batch.task_ids.tolist() == values
    assert torch.equal(batch.sort(samples), want)
    assert batch.task_ptr(3, 1).tolist() == [0, 2, 3, 4]


@every_pair(
    made_inside=[True, False],
    values=[[0, 0, 1, 2], [2, 0, 1, 0]],
    make=[MultiTaskLoRALinear, MultiTaskHead],
)
def test_a_batch_that_inference_mode_saw_trains_afterwards(make, values, made_inside):
    options = {"rank": 1} if make is MultiTaskLoRALinear else {}
    layer, x = make(2, 3, num_tasks=3, **options), torch.randn(4, 2, 2, requires_grad=True)
    batch = None if made_inside else TaskBatch(torch.tensor(values))
    with torch.inference_mode():
        batch = batch or TaskBatch(torch.tensor(values))
        seen = layer(x, batch)
    y = layer(x, batch)
    assert torch.equal(y, seen)
    y.sum().backward()
    assert x.grad.abs().sum() > 0


def test_a_packed_batch_that_inference_mode_saw_trains_afterwards():
    layer, x = MultiTaskLoRALinear(2, 3, num_tasks=3, rank=1), torch.randn(1, 4, 2)
    with torch.inference_mode():
        batch = TaskBatch(torch.tensor([0, 2]), lengths=[1, 3])
        layer(x, batch)
    layer(x, batch).sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_an_int_is_the_task_of_all_samples():
    layer = MultiTaskLoRALinear(4, 3, num_tasks=3, rank=1)
    nn.init.normal_(layer.lora_B)
    for shape in [(5, 4), (5, 2, 4)]:
        x = torch.randn(shape)
        with tasks(2):
            torch.testing.assert_close(layer(x), layer(x, TaskBatch(torch.full((5,), 2))))
    with pytest.raises(ValueError, match=r"task_ids must be in 0\.\.2, .* got 3"):
        layer(torch.randn(5, 4), TaskBatch(3))
    with pytest.raises(TypeError, match="or an int for samples of one task, got bool"):
        TaskBatch(True)
