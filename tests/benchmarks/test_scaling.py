"""The formulas of benchmarks/scaling.py beside the bytes that processes store and exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.scaling import Model, cost, seven_billion, table
from metalora.adapters import LoRAConfig, adapt, task_parameters
from metalora.meta import Callback, Distribution, RoundLoader, TaskOptimizer, TrainConfig, lora_ml
from metalora.nn import tasks
from tests.processes import needs_gloo, run_processes

WIDTH, RANK, T = 12, 2, 6
LORA = LoRAConfig(rank=RANK)
SIZES = Model(
    shared=2 * (WIDTH * WIDTH + WIDTH),
    per_task=2 * 2 * RANK * WIDTH,
    largest=WIDTH * WIDTH + WIDTH,
    bytes_each=8,
)


class Exchanged(TorchDispatchMode):
    """Adds up the buffers of collectives: what is summed or scattered, and what is gathered."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "c10d" and name != "barrier":
            place = 1 if "reduce_scatter" in name else 0  # the whole of what is scattered
            every = args[place] if isinstance(args[place], (list, tuple)) else [args[place]]
            self.bytes += sum(t.numel() * t.element_size() for t in every)
        return func(*args, **(kwargs or {}))


def bytes_of(tensors: Any) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(t.numel() * t.element_size() for t in local if t.dim())


def stored(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    moments = [v for state in optimizer.state.values() for k, v in state.items() if "exp_avg" in k]
    every = list(model.parameters())
    return bytes_of([*every, *(p.grad for p in every if p.grad is not None), *moments])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).double()


def rounds() -> RoundLoader:
    ids = torch.arange(T).repeat_interleave(3)
    x = torch.randn(len(ids), WIDTH, dtype=torch.float64)
    return RoundLoader(x, torch.randint(WIDTH, ids.shape), ids, batch_size=3)


class Measured(Callback):
    """Measures the second step, after which gradients and moments are there."""

    def on_start(self, training: Any) -> None:
        self.mode = Exchanged()

    def on_step(self, training: Any, loss: torch.Tensor) -> None:
        if training.steps_done == 1:
            self.mode.__enter__()
        elif training.steps_done == 2:
            self.mode.__exit__(None, None, None)
            self.stored = stored(training.model, training.step.optimizer)


def trained(parallel: str) -> tuple[int, int]:
    measured = Measured()
    config = TrainConfig(epochs=2, lr=0.01, parallel=parallel)
    lora_ml(network(), rounds(), config, LORA, callbacks=[measured])
    return measured.stored, measured.mode.bytes


def sharded(parallel: str) -> tuple[int, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    loader = rounds()
    distribution = Distribution(parallel, loader.samples_per_task)
    model = adapt(network(), LORA, T, tasks=distribution.held if distribution.by_task else None)
    own, mesh = task_parameters(model), init_device_mesh("cpu", (distribution.world_size,))
    for module in (*model, model):
        fully_shard(module, mesh=mesh, ignored_params=set(own), reshard_after_forward=True)
    optimizer = TaskOptimizer(model, torch.optim.Adam, lr=0.01, task_parallel=distribution.by_task)
    (batch,) = loader
    part = distribution.part(batch)
    with Exchanged() as exchanged:
        with tasks(part.task_ids, counts=part.counts):
            losses = F.cross_entropy(model(part.inputs), part.targets, reduction="none")
        (losses * part.weights).sum().backward()
        distribution.sum_gradients([] if distribution.by_task else own, losses.sum())
    optimizer.step()
    return stored(model, optimizer), exchanged.bytes


def every_way() -> dict[tuple[str, bool], tuple[int, int]]:
    found = {(parallel, False): trained(parallel) for parallel in ("data", "tasks")}
    if dist.is_initialized() and dist.get_world_size() > 1:
        found.update({(parallel, True): sharded(parallel) for parallel in ("data", "tasks")})
    return found


@pytest.mark.slow
@needs_gloo
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_formulas_are_what_processes_store_and_exchange(processes: int) -> None:
    by_rank = [every_way()] if processes == 1 else run_processes(every_way, processes)
    for (parallel, is_sharded), _ in by_rank[0].items():
        wanted = cost(SIZES, T, processes, by_task=parallel == "tasks", sharded=is_sharded)
        memory = max(own[parallel, is_sharded][0] for own in by_rank)
        exchanged = max(own[parallel, is_sharded][1] for own in by_rank)
        # With the gradients go the loss and, for each parameter, whether it has one. Another
        # exchange says before an epoch whether to end, and data parallel one which tasks are
        # present, an int32 for each task and layer.
        extra = 8 * (1 + 4 + 4 + 1) + 4 * 2 * (T + 1)
        assert wanted.exchanged <= exchanged <= wanted.exchanged + extra * (processes > 1)
        assert memory == wanted.stored


def test_the_table() -> None:
    model = seven_billion(8)
    assert model.shared == 6_738_415_616  # as its publishers count
    assert model.per_task == 19_988_480
    text = table().markdown()
    assert text.count("\n") == 5
    assert [row[0] for row in table().rows][1] == "task parallel"
