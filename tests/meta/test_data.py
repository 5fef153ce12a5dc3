"""Rounds of samples."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from metalora.adapters import LoRAConfig
from metalora.meta import (
    Batch,
    Callback,
    Checkpoint,
    RoundLoader,
    TrainConfig,
    lora_ml,
    reptile,
    standard,
)
from metalora.meta.data import samples_per_task
from metalora.meta.mean import sample_weights

IDS = torch.tensor([0, 1, -1, 2, 0, 0, 1, 0, 0, -1, 2, 0, 0])  # 7, 2, 2 samples, 2 left out
X = torch.arange(len(IDS))[:, None].float()
Y = torch.arange(len(IDS)) * 10


def loader(**options):
    return RoundLoader(X, Y, IDS, **{"batch_size": 3, "seed": 5, **options})


def seen(batches):
    return [int(i) for batch in batches for i in batch.inputs[:, 0]]


def test_every_sample_comes_once_an_epoch_with_its_target_and_task():
    batches = list(loader())
    assert sorted(seen(batches)) == [i for i, t in enumerate(IDS) if t >= 0]
    for batch in batches:
        rows = batch.inputs[:, 0].long()
        assert torch.equal(batch.targets, Y[rows])
        assert torch.equal(batch.task_ids, IDS[rows])


def test_a_round_has_samples_of_all_tasks_sorted():
    source = loader()
    batches = list(source)
    assert [batch.counts for batch in batches] == [(3, 2, 2), (3, 0, 0), (1, 0, 0)]
    assert len(source) == 3
    assert source.num_tasks == 3
    assert source.rounds_per_task == [3, 1, 1]
    for batch in batches:
        assert batch.task_ids.tolist() == sorted(batch.task_ids.tolist())
        assert torch.bincount(batch.task_ids, minlength=3).tolist() == list(batch.counts)


def test_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        source = loader(seed=seed)
        source.set_epoch(epoch)
        return seen(source)

    torch.manual_seed(1)
    first = order(5, 2)
    torch.manual_seed(2)
    assert order(5, 2) == first
    assert order(5, 3) != first
    assert order(6, 2) != first


def test_without_shuffling_the_order_is_that_of_the_tensors():
    source = loader(shuffle=False, batch_size=2)
    assert seen(source) == [0, 4, 1, 6, 3, 10, 5, 7, 8, 11, 12]
    source.set_epoch(1)
    assert seen(source) == [0, 4, 1, 6, 3, 10, 5, 7, 8, 11, 12]


def test_pooled_batches_ignore_tasks():
    source = loader(order="pooled", batch_size=4)
    batches = list(source)
    assert [len(batch.targets) for batch in batches] == [4, 4, 3]
    assert len(source) == 3
    assert sorted(seen(batches)) == [i for i, t in enumerate(IDS) if t >= 0]
    for batch in batches:
        assert batch.task_ids.tolist() == sorted(batch.task_ids.tolist())
        assert torch.bincount(batch.task_ids, minlength=3).tolist() == list(batch.counts)


def test_rounds_in_proportion_hold_every_task():
    sizes = [40, 16, 8, 2]
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    samples = torch.arange(len(ids))
    for shuffle in (True, False):
        source = RoundLoader(
            samples, samples, ids, batch_size=9, seed=3, order="proportional", shuffle=shuffle
        )
        batches = list(source)
        assert len(batches) == len(source) == 8  # 66 samples, at most 9 a batch
        assert {len(batch.targets) for batch in batches} == {8, 9}
        assert sorted(int(i) for batch in batches for i in batch.inputs) == samples.tolist()
        for task, size in enumerate(sizes):
            counts = [batch.counts[task] for batch in batches]
            # A batch's share of the epoch is an eighth, give or take what rounding moves.
            assert sum(counts) == size and max(counts) - min(counts) <= 2
            assert all(abs(count - size / 8) < 1.5 for count in counts)
        for batch in batches:
            assert batch.task_ids.tolist() == sorted(batch.task_ids.tolist())
            assert torch.bincount(batch.task_ids, minlength=4).tolist() == list(batch.counts)
    assert not source.pooled and source.rounds_per_task == [8, 8, 8, 2]


def test_rounds_in_proportion_are_drawn_anew_each_epoch():
    def order(seed, epoch):
        source = loader(order="proportional", seed=seed)
        source.set_epoch(epoch)
        return seen(source)

    assert order(5, 2) == order(5, 2)
    assert order(5, 3) != order(5, 2) != order(6, 2)
    assert sorted(order(5, 3)) == [i for i, t in enumerate(IDS) if t >= 0]


def test_samples_of_a_batch_count_the_same_on_request():
    sizes = torch.arange(float(len(IDS)))
    for order in ("rounds", "proportional", "pooled"):
        batch = next(iter(loader(order=order, weighting="samples", sizes=sizes)))
        assert batch.weighting == "samples"
        whole = batch.sizes.double().sum()
        torch.testing.assert_close(batch.loss_weights(), batch.sizes.double() / whole)
        some = batch.take(torch.arange(2))
        assert some.weighting == "samples" and some.loss_weights().sum() == 1
        own = replace(batch, weights=torch.ones(len(batch.task_ids)))
        assert own.loss_weights() is own.weights
    (batch, *_) = loader()
    assert batch.weighting == "tasks"
    assert torch.equal(batch.loss_weights(), sample_weights(batch.task_ids))
    assert next(iter(loader(order="pooled"))).weighting == "samples"
    assert loader(weighting="samples").identity()["weighting"] == "samples"
    for former in (loader(), loader(order="pooled")):  # whose checkpoints had no such entry
        assert "weighting" not in former.identity()
    with pytest.raises(ValueError, match="Batch: weighting must be one of"):
        replace(batch, weighting="sample").loss_weights()
    with pytest.raises(ValueError, match=r"weighting must be one of .*did you mean 'samples'"):
        loader(weighting="sample")


SINGLE = {
    "interleaved": [0, 1, 2, 0, 0],
    "blocked": [0, 0, 0, 1, 2],
}  # the batches' tasks, 3 samples each at most, of 7, 2 and 2


@pytest.mark.parametrize("order", SINGLE)
def test_batches_of_one_task_come_in_turn_or_in_blocks(order):
    source = loader(order=order)
    batches = list(source)
    assert [batch.tasks_present() for batch in batches] == [[task] for task in SINGLE[order]]
    assert len(source) == 5 and source.rounds_per_task == [3, 1, 1] and not source.pooled
    assert sorted(seen(batches)) == [i for i, t in enumerate(IDS) if t >= 0]
    for batch in batches:
        rows = batch.inputs[:, 0].long()
        assert torch.equal(batch.targets, Y[rows])
        assert torch.equal(batch.task_ids, IDS[rows])
        assert torch.bincount(batch.task_ids, minlength=3).tolist() == list(batch.counts)


@pytest.mark.parametrize("order", ["rounds", "interleaved", "blocked", "pooled"])
def test_every_order_repeats_by_seed_and_epoch_and_gives_each_sample_once(order):
    def epoch(number, seed=5):
        source = loader(order=order, seed=seed)
        source.set_epoch(number)
        return seen(source)

    assert epoch(2) == epoch(2) != epoch(3)
    assert epoch(2, seed=6) != epoch(2)
    assert sorted(epoch(2)) == sorted(epoch(3)) == [i for i, t in enumerate(IDS) if t >= 0]


def test_orders_of_single_tasks_hold_the_same_batches():
    found = {
        order: sorted(tuple(seen([batch])) for batch in loader(order=order)) for order in SINGLE
    }
    by_rounds = [part for batch in loader() for part in batch.by_task()]
    assert found["interleaved"] == found["blocked"] == sorted(tuple(seen([p])) for p in by_rounds)


@pytest.mark.parametrize(
    ("order", "per_task"),
    [
        ("rounds", [2, 1, 1]),
        ("interleaved", [1, 1, 0]),
        ("blocked", [2, 0, 0]),
        ("pooled", [2] * 3),
    ],
)
def test_max_rounds_ends_the_epoch(order, per_task):
    source = loader(max_rounds=2, order=order)
    assert len(source) == len(list(source)) == 2
    assert source.rounds_per_task == per_task


def test_transform_gets_fresh_randomness_that_repeats():
    def noise(inputs, generator):
        return torch.rand(inputs.shape, generator=generator)

    def epoch(number):
        source = loader(transform=noise)
        source.set_epoch(number)
        return torch.cat([batch.inputs for batch in source])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))
    assert len(set(epoch(1).flatten().tolist())) == 11


@pytest.mark.parametrize("known", [True, False])
def test_split_by_task(known):
    ids = torch.tensor([0, 0, 2]) if known else torch.tensor([2, 0, 0])
    batch = Batch(torch.arange(3.0), torch.arange(3), ids, (2, 0, 1) if known else None)
    parts = batch.by_task()
    assert [part.task_ids.tolist() for part in parts] == [[0, 0], [2]]
    assert [part.inputs.tolist() for part in parts] == ([[0, 1], [2]] if known else [[1, 2], [0]])
    assert [part.tasks_present() for part in parts] == [[0], [2]]


def test_inputs_may_be_a_mapping_of_tensors():
    source = RoundLoader({"x": X, "twice": 2 * X}, Y, IDS, batch_size=3, seed=5)
    for batch, alone in zip(source, loader(), strict=True):
        assert torch.equal(batch.inputs["x"], alone.inputs)
        assert torch.equal(batch.inputs["twice"], 2 * alone.inputs)
    assert [p.inputs["x"].tolist() for p in batch.by_task()] == [batch.inputs["x"].tolist()]


def test_taking_samples_keeps_what_belongs_to_them():
    (batch, *_) = loader()
    batch = replace(batch, weights=torch.arange(7.0), collate=lambda whole: [whole])
    part = batch.take(torch.tensor([5, 1]))
    assert torch.equal(part.inputs, batch.inputs[[5, 1]])
    assert torch.equal(part.targets, batch.targets[[5, 1]])
    assert part.task_ids.tolist() == [2, 0]
    assert part.weights.tolist() == [5, 1]
    assert part.counts is None
    assert part.collate is batch.collate
    with pytest.raises(ValueError, match="packed and cannot be taken apart"):
        replace(batch, lengths=(1,) * 7).take(slice(2))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be an int >= 1, got 0"),
        (
            {"order": "block"},
            ValueError,
            "order must be one of ['rounds', 'proportional', 'interleaved'",
        ),
        ({"order": "block"}, ValueError, "got 'block'; did you mean 'blocked'?"),
        ({"max_rounds": 0}, ValueError, "max_rounds must be an int >= 1"),
        (
            {"inputs": [1]},
            TypeError,
            "inputs must be a tensor, got list; RoundLoader takes tensors",
        ),
        ({"inputs": X.numpy()}, TypeError, "got ndarray; RoundLoader takes tensors"),
        ({"inputs": TensorDataset(X)}, TypeError, "numbers, torch.arange(N), with collate= to"),
        ({"inputs": {"x": X, "y": 1}}, TypeError, "inputs['y'] must be a tensor, got int"),
        ({"targets": Y[:3]}, ValueError, "must have the same length, got 13, 3 and 13"),
        ({"inputs": {"x": X, "y": X[:2]}}, ValueError, "inputs['y'], targets and task_ids must"),
        ({"task_ids": IDS.float()}, ValueError, "task_ids must be int64 [N], got torch.float32"),
        ({"task_ids": IDS - 1}, ValueError, "task_ids must be >= -1, got -2"),
        ({"task_ids": torch.full((13,), -1)}, ValueError, "leave no sample to draw from"),
        ({"task_ids": IDS + (IDS == 1)}, ValueError, "task 1 of 3 has no samples; number them by"),
        ({"task_ids": IDS.int()}, ValueError, "got torch.int32 [13]; task_ids.long()"),
        ({"num_tasks": 2}, ValueError, "num_tasks must be above all task_ids, got 2 and task 2"),
        ({"num_tasks": 0}, ValueError, "num_tasks must be an int >= 1, got 0"),
        ({"sizes": -Y.float() - 1}, ValueError, "sizes must be finite numbers >= 0"),
        ({"sizes": Y * math.nan}, ValueError, "sizes must be finite numbers >= 0"),
    ],
)
def test_bad_arguments_are_refused(change, error, message):
    arguments = {"inputs": X, "targets": Y, "task_ids": IDS, "batch_size": 3, **change}
    with pytest.raises(error, match=re.escape(message)):
        RoundLoader(
            arguments.pop("inputs"),
            arguments.pop("targets"),
            arguments.pop("task_ids"),
            **arguments,
        )


def test_batches_have_the_sizes_of_their_samples():
    ids = torch.arange(12) % 3
    inputs, sizes = torch.arange(12), torch.arange(12) + 100
    loader = RoundLoader(inputs, inputs, ids, batch_size=2, seed=1, sizes=sizes)
    for batch in loader:
        assert torch.equal(batch.sizes, batch.inputs + 100)
        for part in batch.by_task():
            assert torch.equal(part.sizes, part.inputs + 100)
    without = RoundLoader(inputs, inputs, ids, batch_size=2, seed=1)
    assert next(iter(without)).sizes is None
    assert loader.identity() != without.identity()
    with pytest.raises(ValueError, match="sizes, targets and task_ids must have the same length"):
        RoundLoader(inputs, inputs, ids, batch_size=2, sizes=sizes[1:])


@pytest.mark.parametrize("order", ["rounds", "proportional", "interleaved", "blocked", "pooled"])
def test_tasks_without_samples_are_in_no_batch(order):
    ids = torch.tensor([3, 1, 1, 3, -1, 1])
    numbers, some = torch.arange(6), {"batch_size": 2, "order": order}
    source = RoundLoader(numbers, numbers, ids, num_tasks=5, **some)
    assert source.num_tasks == 5 and source.samples_per_task == [0, 3, 0, 2, 0]
    seen = torch.cat([batch.inputs for batch in source])
    assert sorted(seen.tolist()) == [0, 1, 2, 3, 5]
    for batch in source:
        assert len(batch.counts) == 5 and sum(batch.counts) == len(batch.task_ids)
        assert set(batch.tasks_present()) <= {1, 3}
    assert source.identity() != RoundLoader(numbers, numbers, ids, num_tasks=6, **some).identity()
    same = [RoundLoader(numbers, numbers, numbers % 3, num_tasks=n, **some) for n in (None, 3)]
    assert same[0].identity() == same[1].identity()


class Unsliced(tuple):
    """Counts of which no part is taken, as would take long for many tasks."""

    def __getitem__(self, index):
        assert not isinstance(index, slice)
        return super().__getitem__(index)


def test_a_batch_is_cut_by_task_in_one_go():
    ids = torch.tensor([0, 0, 2])
    batch = Batch(X[:3], Y[:3], ids, Unsliced((2, 0, 1)))
    assert batch.tasks_present() == [0, 2]
    assert [part.tasks_present() for part in batch.by_task()] == [[0], [2]]
    assert Batch(X[:0], Y[:0], ids[:0], (0, 0)).tasks_present() == []
    assert [part.targets.tolist() for part in batch.by_task()] == [[0, 10], [20]]


def test_a_loader_that_knows_its_samples_is_not_asked_for_its_rounds():
    class Known:
        samples_per_task = (3, 1)

    assert samples_per_task(Known()) == (3, 1)


def test_numbers_of_numpy_become_plain_ones(tmp_path):
    one = np.int64(1)
    source = RoundLoader(
        X, torch.zeros(13).long(), IDS, batch_size=np.int64(5), seed=one, max_rounds=one
    )
    assert {type(source.identity()[name]) for name in ("batch_size", "seed", "max_rounds")} == {int}
    config = TrainConfig(
        epochs=one, lr=np.float32(0.5), seed=one, grad_clip=np.float64(1), adapter_lr=np.float32(1),
        warmup_steps=one, schedule_unit="step",
    )  # fmt: skip
    for name in ("epochs", "seed", "warmup_steps"):
        assert type(getattr(config, name)) is int, name
    for name in ("lr", "grad_clip", "adapter_lr"):
        assert type(getattr(config, name)) is float, name
    callbacks = [Checkpoint(tmp_path / "a")]
    standard(nn.Linear(1, 2), source, config, validate_every=one, callbacks=callbacks)


def test_a_transform_may_draw_from_torchs_own_generator():
    """It repeats by seed, epoch and batch, and leaves what others draw as it is."""

    def noisy(inputs, generator):
        return inputs + torch.rand(len(inputs), 1)

    def inputs_of(draws):
        found = []
        for batch in loader(transform=noisy):
            found.append(batch.inputs)
            torch.rand(draws)
        return torch.cat(found)

    assert torch.equal(inputs_of(0), inputs_of(7))
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    iterator = iter(loader(transform=noisy))
    first, second = next(iterator).inputs, next(iterator).inputs
    assert torch.equal(torch.rand(4), wanted)
    assert not torch.equal(first[:1] % 1, second[:1] % 1)


class LastRate(Callback):
    def on_step(self, training, loss):
        self.rate, self.steps = training.step.optimizer.param_groups[0]["lr"], training.steps_done


@pytest.mark.parametrize("order", ["rounds", "proportional"])
@pytest.mark.parametrize("method", ["step per task", "reptile"])
def test_a_schedule_by_steps_ends_where_one_task_has_most_samples(method, order):
    ids = torch.tensor([0] * 200 + [t for t in range(1, 21) for _ in range(4)])
    inputs = torch.randn(len(ids), 3)
    rounds = RoundLoader(inputs, (inputs[:, 0] > 0).long(), ids, batch_size=14, order=order)
    settings = {"lr": 0.1, "optimizer": "sgd", "schedule": "linear", "schedule_unit": "step"}
    config, last = TrainConfig(epochs=2, **settings), LastRate()
    model = nn.Linear(3, 2)
    if method == "reptile":
        reptile(model, rounds, config, inner_steps=4, inner_lr=0.01, callbacks=[last])
    else:
        config, lora = replace(config, step_per="task"), LoRAConfig(rank=1, heads=[])
        lora_ml(nn.Sequential(model), rounds, config, lora, callbacks=[last])
    assert last.steps > 40 and last.rate < 0.005
