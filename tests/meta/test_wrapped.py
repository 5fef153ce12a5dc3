"""Users' own loops with FSDP2 and DistributedDataParallel equal one process, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.adapters import LoRAConfig, adapt, task_parameters
from metalora.meta import Distribution, TaskOptimizer, TrainConfig, standard, task_mean
from metalora.nn import tasks
from tests.meta.test_distribution import COUNTS, close, network, rounds
from tests.processes import needs_gloo, run_processes

pytestmark = [pytest.mark.slow, needs_gloo]
LORA = LoRAConfig(rank=2, target_modules=["0", "3"], heads=["5"])
T = len(COUNTS)


def plain() -> nn.Module:
    model = network()
    model[2].p = 0.0
    return model


def optimizer_of(model: nn.Module, **options: Any) -> TaskOptimizer:
    return TaskOptimizer(model, torch.optim.AdamW, lr=0.02, weight_decay=0.1, **options)


def alone() -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    model = adapt(plain(), LORA, T)
    optimizer = optimizer_of(model)
    for batch in rounds():
        with tasks(batch.task_ids):
            losses = F.cross_entropy(model(batch.inputs), batch.targets, reduction="none")
        task_mean(losses, batch.task_ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def sharded(parallel: str, mesh_shape: tuple[int, ...]) -> dict[str, Any]:
    """The weights after training with the base in shards, in full; a task's own by (name, task)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    torch.manual_seed(2)
    distribution = Distribution(parallel, rounds().samples_per_task)
    model = adapt(plain(), LORA, T, tasks=distribution.held if distribution.by_task else None)
    own = task_parameters(model)
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for module in (model[0], model[3], model):
        fully_shard(module, mesh=mesh, ignored_params=set(own))
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums, as the weights are the whole batch's
    optimizer = optimizer_of(model, task_parallel=distribution.by_task)
    replicated = [] if distribution.by_task else own
    for batch in rounds():
        part = distribution.part(batch)
        with tasks(part.task_ids, counts=part.counts):
            losses = F.cross_entropy(model(part.inputs), part.targets, reduction="none")
        loss = (losses * part.weights).sum()
        loss.backward()
        distribution.sum_gradients(replicated, loss)
        optimizer.step()
        optimizer.zero_grad()
    found: dict[str, Any] = {}
    for name, p in model.named_parameters():
        if isinstance(p, DTensor):
            found[name] = p.full_tensor().detach()
        else:
            found.update({(name, t): p.detach()[i] for i, t in enumerate(distribution.tasks)})
    return found


def with_ddp() -> dict[str, Any]:
    torch.manual_seed(2)
    distribution = Distribution("data", rounds().samples_per_task)
    model = adapt(plain(), LORA, T)
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = optimizer_of(model)
    for batch in rounds():
        part = distribution.part(batch)
        with tasks(part.task_ids, counts=part.counts):
            losses = F.cross_entropy(wrapped(part.inputs), part.targets, reduction="none")
        loss = (losses * part.weights).sum()
        (loss * distribution.world_size).backward()  # DistributedDataParallel takes the mean
        optimizer.step()
        optimizer.zero_grad()
    config = TrainConfig(epochs=1, lr=0.1)
    with pytest.raises(ValueError, match="adapt: the model must not be wrapped in DistributedD"):
        adapt(nn.parallel.DistributedDataParallel(plain()), LORA, T)
    with pytest.raises(ValueError, match="train: the model must not be wrapped in Distributed"):
        standard(nn.parallel.DistributedDataParallel(plain()), rounds(), config)
    return {name: p.detach() for name, p in model.named_parameters()}


def refuses_tensor_parallelism() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = adapt(plain(), LORA, T)
    with pytest.raises(NotImplementedError, match="only support"):
        parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel()})


def on_two() -> dict[str, Any]:
    refuses_tensor_parallelism()
    found = {f"fsdp, {p}": sharded(p, (2,)) for p in ("data", "tasks")}
    return {**found, "ddp": with_ddp()}


def on_four() -> dict[str, Any]:
    return {f"hsdp, {p}": sharded(p, (2, 2)) for p in ("data", "tasks")}


@pytest.mark.parametrize(("processes", "trained"), [(2, on_two), (4, on_four)])
def test_wrapped_models_equal_one_process(processes: int, trained: Any) -> None:
    wanted = alone()
    by_rank = run_processes(trained, processes)
    for name in by_rank[0]:
        tasks_seen = set()
        for own in by_rank:
            for key, value in own[name].items():
                if isinstance(key, tuple):
                    tasks_seen.add(key[1])
                    close(value, wanted[key[0]][key[1]], f"{name}: {key}")
                else:
                    close(value, wanted[key], f"{name}: {key}")
        assert name == "ddp" or tasks_seen == set(range(T))
