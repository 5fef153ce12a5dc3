"""Times the shallow network's trainings beside eager PyTorch.

python -m benchmarks.shallow_training [--threads N] [--device cuda] [--write DIR]

The trainings are the paper's: d = 10, T = 3, k = 1, N = 1000, 40000 epochs, or 15000 of fine-tuning
on n = 100, in float32. All versions run a few epochs; their times are scaled to all of them.

With ``--threads 1`` processor time is measured. That is the fair comparison on any number of cores:
trainings are independent, and eager PyTorch makes most of the cores with a process on each, since
its tensors are too small to share between threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.operators import command
from benchmarks.lib.trainings import TrainingCase, Version, by_reference
from metalora.shallow import (
    Adapters,
    Network,
    finetune_lora,
    initial_adapters,
    initial_network,
    lora_ml,
    sample_data,
    sample_problem,
    standard,
)

TASKS, SAMPLES, DIM, RANK, FEW = 3, 1000, 10, 1, 100
ADAMW = (1e-3, 0.01)  # learning rate and weight decay
NATIVE_EPOCHS, EPOCHS = 400, 10  # of a timed call


@dataclass(frozen=True)
class Start:
    """What trainings begin with: x [B, T, N, d], y [B, T, N], and T = 1 in fine-tuning."""

    method: str
    x: Tensor
    y: Tensor
    network: Network
    adapters: Adapters | None


def start(method: str, trainings: int, dtype: torch.dtype, device: str) -> Start:
    """The same numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    common: dict[str, Any] = {"generator": generator, "dtype": dtype}
    problem = sample_problem(TASKS, DIM, RANK, batch_shape=(trainings,), **common)
    network = initial_network(DIM, batch_shape=(trainings,), **common)
    tasks, count, truth = TASKS, SAMPLES, problem.networks
    if method == "finetune_lora":
        tasks, count = 1, FEW
        test = problem.test_network
        truth = Network(test.weight.unsqueeze(1), test.output.unsqueeze(1))
    x, y = (t.to(device) for t in sample_data(truth, count, generator=generator))
    network = Network(network.weight.to(device), network.output.to(device))
    if method == "standard":
        return Start(method, x, y, network, None)
    pair = initial_adapters(RANK, DIM, batch_shape=(trainings, tasks), **common)
    return Start(method, x, y, network, Adapters(pair.lora_A.to(device), pair.lora_B.to(device)))


def metalora(s: Start, epochs: int) -> Tensor:
    """The losses [B, epochs]."""
    if s.adapters is None:
        return standard(s.x, s.y, s.network, epochs=epochs).losses
    if s.method == "lora_ml":
        return lora_ml(s.x, s.y, s.network, s.adapters, epochs=epochs).losses
    adapters = Adapters(s.adapters.lora_A[:, 0], s.adapters.lora_B[:, 0])
    return finetune_lora(s.x[:, 0], s.y[:, 0], s.network, adapters, epochs=epochs).losses


class Eager:
    """Eager PyTorch with autograd and torch.optim.AdamW; goes on from epoch to epoch."""

    def __init__(
        self, s: Start, trainings: int | None, *, fused: bool = True, rows: bool = True
    ) -> None:
        self.x, self.y = s.x[:trainings], s.y[:trainings]
        if s.adapters is None:  # one task of all samples
            self.x, self.y = self.x.flatten(1, 2).unsqueeze(1), self.y.flatten(1, 2).unsqueeze(1)
        self.rows = rows
        frozen = s.method == "finetune_lora"
        self.weight = s.network.weight[:trainings].clone().requires_grad_(not frozen)
        self.output = s.network.output[:trainings].clone().requires_grad_(not frozen)
        self.adapters: list[Tensor] = []
        if s.adapters is not None:
            pair = (s.adapters.lora_A, s.adapters.lora_B)
            self.adapters = [p[:trainings].clone().requires_grad_() for p in pair]
        self.columns = self.x.flatten(0, 1).mT.contiguous()
        leaves = [p for p in (self.weight, self.output, *self.adapters) if p.requires_grad]
        self.optimizer = torch.optim.AdamW(leaves, lr=ADAMW[0], weight_decay=ADAMW[1], fused=fused)

    def step(self, loss: Tensor) -> Tensor:
        """One epoch's backward and step; ``loss`` [B]."""
        self.optimizer.zero_grad()
        loss.sum().backward()
        self.optimizer.step()
        return loss.detach()

    def loop(self) -> Tensor:
        """An epoch of one training, a loop over its tasks."""
        loss = self.x.new_zeros(())
        for t in range(self.x.shape[1]):
            hidden = self.x[0, t] @ self.weight[0].T
            if self.adapters:
                hidden = hidden + self.x[0, t] @ self.adapters[0][0, t].T @ self.adapters[1][0, t].T
            predicted = hidden.sigmoid() @ self.output[0]
            loss = loss + torch.nn.functional.mse_loss(predicted, self.y[0, t])
        return self.step((loss / self.x.shape[1]).reshape(1))

    def batched(self) -> Tensor:
        """An epoch of all trainings and tasks in one batched product, adapters merged into A."""
        trainings, tasks, count, dim = self.x.shape
        weight = self.weight.unsqueeze(1).expand(trainings, tasks, dim, dim).flatten(0, 1)
        if self.adapters:
            a, b = (p.flatten(0, 1) for p in self.adapters)
            weight = torch.baddbmm(weight, b, a)
        output = self.output.unsqueeze(1).expand(trainings, tasks, dim).flatten(0, 1)
        if self.rows:  # samples are rows
            hidden = torch.bmm(self.x.flatten(0, 1), weight.mT).sigmoid()
            predicted = torch.bmm(hidden, output.unsqueeze(-1))
        else:
            hidden = torch.bmm(weight, self.columns).sigmoid()
            predicted = torch.bmm(output.unsqueeze(1), hidden)
        error = predicted.reshape(trainings, tasks, count) - self.y
        return self.step(error.square().mean((1, 2)))


@dataclass(frozen=True)
class ShallowCase(TrainingCase):
    def versions(self, dtype: torch.dtype, device: str) -> Mapping[str, Version]:
        s = start(self.method, self.trainings, dtype, device)

        def eager(trainings: int | None, form: str, **options: bool) -> Version:
            model = Eager(s, trainings, **options)
            epoch: Callable[[], Tensor] = getattr(model, form)

            def run(epochs: int) -> Tensor:
                return torch.stack([epoch() for _ in range(epochs)], -1)

            return Version(run, EPOCHS, trainings or self.trainings)

        run = partial(metalora, s)
        return {
            "metalora": Version(run, NATIVE_EPOCHS, self.trainings),
            "reference": Version(by_reference(run), EPOCHS, self.trainings),
            "loop": eager(1, "loop", fused=False),
            "loop-fused": eager(1, "loop"),
            "tasks-batched": eager(1, "batched"),
            "all-batched": eager(None, "batched"),
            "columns": eager(None, "batched", rows=False),
        }

    def shrunk(self) -> ShallowCase:
        return replace(self, trainings=2, steps=5)


# After the reference come eager PyTorch's with autograd: a loop over the tasks of one training,
# without and with fused AdamW; its tasks batched; those of all trainings; samples as columns.
VERSIONS = (
    "metalora",
    "reference",
    "loop",
    "loop-fused",
    "tasks-batched",
    "all-batched",
    "columns",
)
BENCHMARK = Benchmark(
    "shallow_training",
    "The shallow network: one training",
    tuple(
        ShallowCase(f"shallow.{method}", group, f"{name}, {at_once} at once", at_once, epochs)
        for group, at_once in (("cpu", 10), ("cuda", 528))
        for method, name, epochs in (
            ("lora_ml", "LoRA-ML", 40000),
            ("standard", "standard retraining", 40000),
            ("finetune_lora", "fine-tuning", 15000),
        )
    ),
    {"all": VERSIONS},
    floor="metalora",
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
