"""A loop with accelerate, and the examples as they stand."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from metalora import TaskOptimizer
from metalora.hf import TaskCollator, TaskRounds, accept_task_ids
from metalora.nn import current_tasks, tasks

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
pytest.importorskip("transformers", reason="needs the package transformers")

from tests.hf.tiny import T, adapted_model, features, pad, state_of_task  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
DATA = features()
IDS = [feature["task_id"] for feature in DATA]


def mean_over_tasks(losses, ids):
    """Spelt out."""
    present = ids.unique()
    return torch.stack([losses[ids == task].mean() for task in present]).mean()


@pytest.mark.parametrize("dispatch", [False, True])
@pytest.mark.parametrize("group", [False, True])
def test_a_loop_with_accelerate_equals_one_without(group, dispatch):
    model, other = adapted_model(), adapted_model()
    objective = accept_task_ids(model)
    rounds = TaskRounds(DATA, IDS, batch_size=2, seed=4)
    loader = DataLoader(rounds, collate_fn=TaskCollator(pad, group=group))
    settings = accelerate.DataLoaderConfiguration(dispatch_batches=dispatch)
    accelerator = accelerate.Accelerator(dataloader_config=settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    seen = []
    for epoch in range(2):
        rounds.set_epoch(epoch)
        expected = [pad(samples) for samples in rounds]
        ids = [torch.tensor([s["task_id"] for s in samples]) for samples in rounds]
        for batch, want, task_ids in zip(loader, expected, ids, strict=True):
            labels = batch.pop("labels")
            seen.append(labels.tolist())
            losses = nn.functional.cross_entropy(model(**batch).logits, labels, reduction="none")
            accelerator.backward(objective.mean(losses))
            assert current_tasks() is None
            optimizer.step()
            optimizer.zero_grad()

            labels = want.pop("labels")
            with tasks(task_ids):
                logits = other(**want).logits
            losses = nn.functional.cross_entropy(logits, labels, reduction="none")
            plain.zero_grad()
            mean_over_tasks(losses, task_ids).backward()
            plain.step()
    assert seen[: len(rounds)] != seen[len(rounds) :]  # accelerate sets the epoch
    for name, value in accelerator.unwrap_model(model).state_dict().items():
        torch.testing.assert_close(value.cpu(), other.state_dict()[name], rtol=0, atol=1e-10)


def test_absent_tasks_stay_as_they_are_with_accumulated_gradients():
    model = adapted_model()
    objective = accept_task_ids(model)
    rounds = TaskRounds(DATA, IDS, batch_size=1, seed=4)
    loader = DataLoader(rounds, collate_fn=TaskCollator(pad))
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2)
    optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=0.01)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    before, present, absent = None, set(), 0
    for _ in range(3):
        for batch in loader:
            with accelerator.accumulate(model):
                present |= set(batch["task_ids"].tolist())
                labels = batch.pop("labels")
                logits = model(**batch).logits
                losses = nn.functional.cross_entropy(logits, labels, reduction="none")
                accelerator.backward(objective.mean(losses))
                optimizer.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            plain = accelerator.unwrap_model(model)
            after = [state_of_task(plain, optimizer, task) for task in range(T)]
            if before is not None:
                for task in range(T):
                    pairs = zip(before[task], after[task], strict=True)
                    assert all(torch.equal(a, b) for a, b in pairs) == (task not in present)
                absent += T - len(present)
            before, present = after, set()
    assert absent > 0


@pytest.mark.slow
def test_the_example_with_accelerate_learns(capsys):
    history = runpy.run_path(str(EXAMPLES / "accelerate_loop.py"))["main"]()
    assert history[-1] < 0.3 < history[0]


@pytest.mark.slow
def test_the_example_with_the_trainer_learns(capsys):
    measured = runpy.run_path(str(EXAMPLES / "transformers_trainer.py"))["main"]()
    assert all(measured[f"eval_task{task}"] > 0.9 for task in range(3))


@pytest.mark.slow
def test_the_example_of_a_causal_model_with_the_trainer_learns(capsys):
    shares = runpy.run_path(str(EXAMPLES / "causal_trainer.py"))["main"]()
    assert min(shares.values()) > 0.9 and len(shares) == 3


@pytest.mark.slow
def test_the_example_with_trl_learns(capsys):
    pytest.importorskip("trl", reason="the example needs the package trl, which tests do without")
    shares = runpy.run_path(str(EXAMPLES / "trl_sft.py"))["main"]()
    assert min(shares.values()) > 0.9 and len(shares) == 3
