"""Batches and rounds, which need neither transformers nor accelerate."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader

from metalora.hf import TaskCollator, TaskRounds
from metalora.meta import RoundLoader

IDS = [2, 0, 1, 1, 0, 2, 1, 1]
FEATURES = [{"x": float(i), "task_id": task} for i, task in enumerate(IDS)]


def collate(samples):
    assert all(sample.keys() == {"x"} for sample in samples)
    return {"x": torch.tensor([sample["x"] for sample in samples])}


def test_samples_are_grouped_by_task():
    batch = TaskCollator(collate)(FEATURES)
    assert batch["x"].tolist() == [1, 4, 2, 3, 6, 7, 0, 5]
    assert batch["task_ids"].tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert batch["task_ids"].dtype == torch.int64
    assert batch["task_counts"] == (2, 4, 2)
    assert list(batch)[-1] == "task_counts"  # accelerate takes the size of a batch from the first
    assert TaskCollator(collate)(FEATURES[:1])["task_counts"] == (0, 0, 1)


def test_ungrouped_samples_keep_their_order():
    batch = TaskCollator(collate, group=False)(FEATURES)
    assert batch["x"].tolist() == list(range(8))
    assert batch["task_ids"].tolist() == IDS
    assert "task_counts" not in batch


def test_rounds_are_those_of_the_round_loader():
    loader = RoundLoader(torch.arange(8), torch.arange(8), torch.tensor(IDS), batch_size=2, seed=3)
    rounds = TaskRounds(FEATURES, IDS, batch_size=2, seed=3)
    assert (len(rounds), rounds.num_tasks) == (2, 3)
    orders = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        rounds.set_epoch(epoch)
        want = [batch.inputs.tolist() for batch in loader]
        assert [[int(f["x"]) for f in samples] for samples in rounds] == want
        orders.append(want)
    assert orders[0] != orders[1]
    assert len(TaskRounds(FEATURES, IDS, batch_size=2, max_rounds=1)) == 1
    still = TaskRounds(FEATURES, IDS, batch_size=2, shuffle=False)
    assert [f["x"] for f in still[0]] == [1, 4, 2, 3, 0, 5]


def test_a_round_is_a_batch():
    rounds = TaskRounds(FEATURES, IDS, batch_size=2)
    batches = list(DataLoader(rounds, collate_fn=TaskCollator(collate)))
    assert [batch["task_counts"] for batch in batches] == [(2, 2, 2), (0, 2)]
    loader = DataLoader(rounds, batch_size=2, collate_fn=TaskCollator(collate))
    with pytest.raises(ValueError, match=r"got 2 rounds .* set per_device_train_batch_size=1"):
        next(iter(loader))


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_draw_the_rounds_of_each_epoch(persistent):
    rounds = TaskRounds(FEATURES, IDS, batch_size=2, seed=3)
    loader = DataLoader(
        rounds, collate_fn=TaskCollator(collate), num_workers=1, persistent_workers=persistent
    )
    for epoch in (0, 1, 2):
        rounds.set_epoch(epoch)
        want = [[f["x"] for f in samples] for samples in rounds]
        assert [batch["x"].tolist() for batch in loader] == want


def test_bad_features_are_refused():
    with pytest.raises(ValueError, match=r"must have 'task_id', got \['x'\]; .*remove_unused_col"):
        TaskCollator(collate)([{"x": 1.0}])
    with pytest.raises(ValueError, match="'cluster' must be >= 0, got -1"):
        TaskCollator(collate, key="cluster")([{"x": 1.0, "cluster": -1}])
    with pytest.raises(TypeError, match=r"must be dictionaries with 'task_id', got tuple; of a"):
        TaskCollator(collate)([(torch.ones(2), 1)])
    for name in ("german", None, 1.5):
        with pytest.raises(
            ValueError, match=f"'task_id' must be a number from 0, got .?{name}.?; nu"
        ):
            TaskCollator(collate)([{"x": 1.0, "task_id": name}])
    with pytest.raises(
        ValueError, match=r"TaskRounds: task_ids must be numbers from 0, got \['a', "
    ):
        TaskRounds(FEATURES[:3], ["a", "b", "c"], batch_size=1)
    with pytest.raises(ValueError, match="dataset and task_ids must have the same length, got 8 a"):
        TaskRounds(FEATURES, IDS[:-1], batch_size=1)


@pytest.mark.slow
def test_importing_brings_neither_transformers_nor_accelerate():
    code = (
        "import sys, metalora.hf;"
        "print({'transformers', 'accelerate', 'peft', 'datasets'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
