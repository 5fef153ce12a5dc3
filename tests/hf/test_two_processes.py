"""transformers.Trainer and accelerate in two processes: a step is of both processes' rounds."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

pytest.importorskip("transformers", reason="needs the package transformers")
accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")

from metalora import TaskOptimizer  # noqa: E402
from metalora.hf import TaskCollator, TaskRounds, accept_task_ids  # noqa: E402
from metalora.meta import task_mean  # noqa: E402
from metalora.nn import tasks  # noqa: E402
from tests.hf.test_trainer import trainer  # noqa: E402
from tests.hf.tiny import adapted_model, features, pad  # noqa: E402
from tests.processes import needs_gloo, run_processes  # noqa: E402

pytestmark = [pytest.mark.slow, needs_gloo]
DATA = features(24)
IDS = [feature["task_id"] for feature in DATA]


def as_torchrun_says() -> None:
    """What Trainer and accelerate look for, in a process that is in a group already."""
    os.environ["ACCELERATE_USE_CPU"] = "1"
    for name in ("RANK", "LOCAL_RANK"):
        os.environ[name] = str(dist.get_rank())
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ[name] = str(dist.get_world_size())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def with_accelerate() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """The batches of this process, and the weights at the end."""
    model = adapted_model()
    objective = accept_task_ids(model)
    rounds = TaskRounds(DATA, IDS, batch_size=2, seed=4)
    loader = DataLoader(rounds, collate_fn=TaskCollator(pad))
    optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=1e-2)
    accelerator = accelerate.Accelerator()
    assert accelerator.num_processes == 2
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    seen = []
    for batch in loader:
        seen.append(dict(batch))
        labels = batch.pop("labels")
        losses = nn.functional.cross_entropy(wrapped(**batch).logits, labels, reduction="none")
        accelerator.backward(objective.mean(losses))
        optimizer.step()
        optimizer.zero_grad()
    return seen, weights(model)


def with_trainer() -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    model = adapted_model()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(model, folder, num_train_epochs=1, ddp_find_unused_parameters=False)
        assert made.args.world_size == 2
        seen: list[dict[str, Any]] = []
        prepare = made._prepare_inputs
        made._prepare_inputs = lambda batch: (seen.append(dict(batch)), prepare(batch))[1]
        made.train()
    return seen, weights(model)


def epochs_and_evaluation() -> tuple[list[int], dict[str, float]]:
    """The epochs of the rounds that a training of three draws, and what is measured before it."""
    model = adapted_model()
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(
            model,
            folder,
            num_train_epochs=3,
            per_device_eval_batch_size=4,
            ddp_find_unused_parameters=False,
        )
        measured = made.evaluate()
        drawn = []
        rounds: Any = made.train_dataset

        def collate(samples: Any) -> Any:
            drawn.append(int(rounds._epoch))
            return pad(samples)

        made.data_collator.collate = collate
        made.train()
    return drawn, {name: value for name, value in measured.items() if "accuracy" in name}


def everything() -> dict[str, Any]:
    as_torchrun_says()
    return {
        "accelerate": with_accelerate(),
        "trainer": with_trainer(),
        "epochs": epochs_and_evaluation(),
    }


def alone(by_rank: list[list[dict[str, Any]]], *, by_samples: bool) -> dict[str, torch.Tensor]:
    """One process takes the steps of both, each of the mean of two rounds."""
    model = adapted_model()
    optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    if not by_samples:
        optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=1e-2)
    for pair in zip(*by_rank, strict=True):
        sizes = [len(batch["labels"]) for batch in pair]
        for batch, size in zip(pair, sizes, strict=True):
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            with tasks(batch["task_ids"]):
                logits = model(**given).logits
            losses = nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
            share = size / sum(sizes) if by_samples else 0.5
            (task_mean(losses, batch["task_ids"]) * share).backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def test_two_processes_take_the_steps_of_one_with_both_rounds() -> None:
    found = run_processes(everything, 2, seconds=120)
    for name, by_samples in (("accelerate", False), ("trainer", True)):
        rounds = [own[name][0] for own in found]
        assert len(rounds[0]) == len(rounds[1]) > 1, name
        wanted = alone(rounds, by_samples=by_samples)
        for own in found:
            for parameter, value in own[name][1].items():
                torch.testing.assert_close(
                    value, wanted[parameter], rtol=0, atol=1e-10, msg=f"{name}: {parameter}"
                )
    drawn, measured = epochs_and_evaluation()
    for own in found:
        epochs, measured_by_two = own["epochs"]
        assert sorted(set(epochs)) == sorted(set(drawn)) == [0, 1, 2]
        assert epochs == sorted(epochs)
        assert measured_by_two == pytest.approx(measured)
