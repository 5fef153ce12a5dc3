"""TaskOptimizer where DistributedDataParallel averages the gradients of two processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, task_parameters
from metalora.meta import RoundLoader, TaskOptimizer, TrainConfig, lora_ml
from metalora.nn import tasks
from tests.processes import needs_gloo, run_processes

pytestmark = needs_gloo
T, STEPS = 4, 3
# Per step and process the task of its samples: task 3 never has any, the others not in every step.
PRESENT = [(0, 1), (1, 1), (2, 0)]


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    adapt(model, LoRAConfig(rank=2, target_modules=["0"], heads=["2"]), T)
    nn.init.normal_(model[0].lora_B)
    return model


def batch(step: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Five samples of the process's task, with its ids."""
    source = torch.Generator().manual_seed(10 * step + rank)
    x = torch.randn(5, 4, dtype=torch.float64, generator=source)
    return x, torch.full((5,), PRESENT[step][rank])


def optimizer_of(model: nn.Module) -> TaskOptimizer:
    return TaskOptimizer(model, torch.optim.AdamW, lr=0.1, weight_decay=0.1)


def alone() -> list[torch.Tensor]:
    """What one process makes of both processes' samples."""
    model = network()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        for rank in range(2):
            x, ids = batch(step, rank)
            with tasks(ids):
                (model(x).square().mean() / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in model.parameters()]


def train() -> None:
    model = network()
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        x, ids = batch(step, torch.distributed.get_rank())
        with tasks(ids):
            parallel(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for found, wanted in zip(model.parameters(), alone(), strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=0, atol=1e-14)
    for found, start in zip(task_parameters(model), task_parameters(network()), strict=True):
        assert torch.equal(found[3], start[3])
        assert not torch.equal(found[1], start[1])


@pytest.mark.slow
def test_a_task_of_any_process_is_present_in_all() -> None:
    run_processes(train, 2)


def retrain() -> list[torch.Tensor]:
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(12) % T
    rounds = RoundLoader(x, (x[:, 0] > 0).long(), ids, batch_size=2, order="interleaved")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    config = TrainConfig(epochs=2, lr=0.1)
    found = lora_ml(model, rounds, config, LoRAConfig(rank=1, target_modules=["0"]))
    return [p.detach() for p in model.parameters()] + [a["0.lora_B"] for a in found.adapters]


def retrain_in_the_first() -> list[torch.Tensor]:
    """The second waits, and takes no part in any exchange."""
    return retrain() if torch.distributed.get_rank() == 0 else []


@pytest.mark.slow
def test_a_training_that_is_not_parallel_is_of_one_process() -> None:
    found, nothing = run_processes(retrain_in_the_first, 2, seconds=20)
    assert not nothing
    for ours, wanted in zip(found, retrain(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=1e-6)
