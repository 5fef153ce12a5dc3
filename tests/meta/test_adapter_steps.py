"""Several steps on adapters and heads per shared step, against loops written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metalora import linear
from metalora.adapters import LoRAConfig, adapted_layers
from metalora.linear import sufficient_statistics
from metalora.meta import (
    Callback,
    RoundLoader,
    TrainConfig,
    derive_seed,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    peft_ml,
    reptile,
    standard,
)

T, D, K = 3, 5, 3
LORA = LoRAConfig(rank=2, alpha=1, heads=["head"])


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(D, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


def network() -> Network:
    torch.manual_seed(0)
    return Network().double()


def rounds() -> RoundLoader:
    """Tasks of 16, 8 and 4 samples: in the last of the four rounds task 0 is alone."""
    inputs = torch.randn(28, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.tensor([0] * 16 + [1] * 8 + [2] * 4)
    return RoundLoader(inputs, (inputs[:, 0] > 0).long(), ids, batch_size=4, seed=2)


def config(**given: Any) -> TrainConfig:
    common = {"epochs": 2, "lr": 0.05, "adapter_lr": 0.02, "weight_decay": 0.1, "seed": 3}
    schedule = {"schedule": "linear", "schedule_unit": "step"}
    return TrainConfig(**{**common, **schedule, "adapter_steps": K, "optimizer": "adamw", **given})


class Starts(Callback):
    """Copies what training starts from."""

    def on_start(self, training: Any) -> None:
        self.state = {k: v.detach().clone() for k, v in training.model.state_dict().items()}


def by_hand(start: dict[str, Tensor], with_lora: bool, settings: TrainConfig) -> dict[str, Tensor]:
    """Plain formulas; an optimiser for the shared weights, one for each task."""
    leaves = {k: v.clone().requires_grad_() for k, v in start.items() if "lora" not in k}
    body = [v for k, v in leaves.items() if k.startswith("body")]
    heads = [[start[f"head.{n}"][t].clone().requires_grad_() for n in ("weight", "bias")]
             for t in range(T)]  # fmt: skip
    lora = [[start[f"body.lora_{ab}"][t].clone().requires_grad_() for ab in "AB"]
            for t in range(T)] if with_lora else [[] for _ in range(T)]  # fmt: skip
    own = [heads[t] + lora[t] for t in range(T)]
    decay = {"weight_decay": settings.weight_decay}
    shared_optimizer = torch.optim.AdamW(body, lr=1.0, **decay)
    of_tasks = [torch.optim.AdamW(parameters, lr=1.0, **decay) for parameters in own]
    weight, bias = leaves["body.weight"], leaves["body.bias"]

    def loss(batch: Any) -> Tensor:
        values = []
        for part in batch.by_task():
            t = int(part.task_ids[0])
            hidden = part.inputs @ weight.T + bias
            if lora[t]:
                a, b = lora[t]
                hidden = hidden + part.inputs @ a.T @ b.T / 2  # alpha 1, rank 2
            logits = torch.tanh(hidden) @ heads[t][0].T + heads[t][1]
            values.append(F.cross_entropy(logits, part.targets))
        return torch.stack(values).mean()

    source, step = rounds(), 0
    total = settings.epochs * len(source)
    for epoch in range(settings.epochs):
        source.set_epoch(epoch)
        for batch in source:
            factor = 1 - step / total  # counts shared steps
            step += 1
            for _ in range(K):
                present = batch.tasks_present()
                values = [p for t in present for p in own[t]]
                for p, grad in zip(values, torch.autograd.grad(loss(batch), values), strict=True):
                    p.grad = grad
                for t in present:
                    of_tasks[t].param_groups[0]["lr"] = settings.adapter_lr * factor
                    of_tasks[t].step()
            for p, grad in zip(body, torch.autograd.grad(loss(batch), body), strict=True):
                p.grad = grad
            shared_optimizer.param_groups[0]["lr"] = settings.lr * factor
            shared_optimizer.step()
    assert step == 8
    ends = {"body.weight": weight, "body.bias": bias}
    for i, name in enumerate(("weight", "bias")):
        ends[f"head.{name}"] = torch.stack([heads[t][i] for t in range(T)])
    for i, ab in enumerate("AB"):
        if with_lora:
            ends[f"body.lora_{ab}"] = torch.stack([lora[t][i] for t in range(T)])
    return {k: v.detach() for k, v in ends.items()}


METHODS: dict[str, Callable[..., Any]] = {
    "lora-ml": lambda *args, **options: lora_ml(*args, LORA, **options),
    "last-layer-ml": lambda *args, **options: last_layer_ml(*args, ["head"], **options),
}


@pytest.mark.parametrize("method", METHODS)
def test_equals_a_loop_written_by_hand(method: str) -> None:
    model, starts = network(), Starts()
    result = METHODS[method](model, rounds(), config(), callbacks=[starts])
    want = by_hand(starts.state, method == "lora-ml", config())
    for name in ("body.weight", "body.bias"):
        torch.testing.assert_close(model.get_parameter(name), want[name], rtol=0, atol=1e-12)
    own = {name for name in want if name not in ("body.weight", "body.bias")}
    assert own == set(result.adapters[0])
    for name in own:
        got = torch.stack([adapter[name] for adapter in result.adapters])
        torch.testing.assert_close(got, want[name], rtol=0, atol=1e-12)


class Watch(Callback):
    """After each shared step of a round in which task 0 is alone: what tasks 1 and 2 have."""

    def __init__(self) -> None:
        self.seen: list[list[Tensor]] = []

    def on_step(self, training: Any, loss: Tensor) -> None:
        layers = adapted_layers(training.model).values()
        own = [p for layer in layers for p in layer.own_task_parameters().values()]
        self.seen.append([p.detach().clone() for p in own])


@pytest.mark.parametrize("method", METHODS)
def test_absent_tasks_do_not_move(method: str) -> None:
    watch = Watch()
    METHODS[method](network(), rounds(), config(epochs=1), callbacks=[watch])
    for before, after in zip(watch.seen[2], watch.seen[3], strict=True):
        assert not torch.equal(before[0], after[0])
        assert torch.equal(before[1:], after[1:])


def test_it_is_the_papers_algorithm_for_the_linear_model() -> None:
    """Ten steps on every U_t, then one on A: as `metalora.linear` does from statistics."""
    n, rank, lr_out, lr_in = 20, 1, 0.03, 0.003
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, n, D, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(T, D, D, generator=generator, dtype=torch.float64)
    start = 0.1 * torch.randn(T, D, rank, generator=generator, dtype=torch.float64)
    want = linear.lora_ml(
        sufficient_statistics(x, y), rank,
        outer_steps=7, inner_steps=10, outer_lr=lr_out, inner_lr=lr_in, initial_factors=start,
    )  # fmt: skip

    class Start(Callback):
        def on_start(self, training: Any) -> None:
            training.model[0].lora_U.data.copy_(start)

    model = nn.Sequential(nn.Linear(D, D, bias=False)).double()
    nn.init.zeros_(model[0].weight)
    ids = torch.arange(T).repeat_interleave(n)
    source = RoundLoader(x.flatten(0, 1), y.flatten(0, 1), ids, batch_size=n)
    settings = TrainConfig(
        epochs=7, lr=lr_out, adapter_lr=T * lr_in, optimizer="sgd", adapter_steps=10
    )  # T: the loss is the mean over tasks
    result = lora_ml(
        model, source, settings, LoRAConfig(rank=rank, symmetric=True),
        loss=lambda out, batch: (out - batch.targets).square().sum(1) / 2, callbacks=[Start()],
    )  # fmt: skip
    torch.testing.assert_close(model[0].weight.detach(), want.weight, rtol=0, atol=1e-12)
    for t in range(T):
        got = result.adapters[t]["0.lora_U"]
        torch.testing.assert_close(got, want.factors[t], rtol=0, atol=1e-12)


def test_adapters_of_peft_get_their_own_rate_and_steps() -> None:
    """Where the layers are peft's, they end as those of `lora_ml` do."""
    peft = pytest.importorskip("peft")
    settings = config(adapter_weight_decay=0.3)
    ends = []
    for fused in (True, False):
        model = network()
        adapter = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["body"])
        starts = Seeded(3)
        peft_ml(model, rounds(), settings, adapter, fused=fused, callbacks=[starts])
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


class Seeded(Callback):
    """Gives every task's lora_A the same numbers, however the layers draw theirs."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_start(self, training: Any) -> None:
        generator = torch.Generator().manual_seed(derive_seed("start", self.seed))
        value = torch.randn(T, 2, D, generator=generator, dtype=torch.float64) / 2
        for name, parameter in training.model.named_parameters():
            if name.endswith("lora_A"):
                parameter.data.copy_(value)
            elif ".lora_A." in name:
                parameter.data.copy_(value[int(name.split(".lora_A.task")[1].split(".")[0])])


@pytest.mark.parametrize("steps", [0, -1])
def test_no_steps_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"adapter_steps must be an int >= 1, got {steps}"):
        config(adapter_steps=steps)


def test_they_are_refused_where_they_mean_nothing() -> None:
    plain = config(adapter_lr=None)
    no_adapters = "train: adapter_steps must be 1 where no adapters or heads of tasks are trained"
    with pytest.raises(ValueError, match=re.escape(no_adapters)):
        standard(network(), rounds(), plain)
    with pytest.raises(ValueError, match="must be 1 where no weights that the tasks share are"):
        finetune_lora(network(), rounds(), plain, LORA)
    with pytest.raises(ValueError, match="reptile: adapter_steps must be 1, as there are no"):
        reptile(network(), rounds(), plain)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_rate_and_decay_of_adapters_are_apart(optimizer: str) -> None:
    """After one step the shared weights are the same, while the heads moved less, or shrank."""

    def step(**given: Any) -> tuple[Tensor, Tensor]:
        model = network()
        settings = TrainConfig(epochs=1, lr=0.05, optimizer=optimizer, **given)
        inputs, targets, ids = rounds().inputs, rounds().targets, rounds().task_ids
        whole = RoundLoader(inputs, targets, ids, batch_size=16)
        (result, start) = last_layer_ml(model, whole, settings, ["head"]), network().head.weight
        moved = torch.stack([a["head.weight"] for a in result.adapters]) - start.detach()
        return model.body.weight.detach(), moved

    body, moved = step()
    slow_body, slow = step(adapter_lr=1e-6)
    decayed_body, decayed = step(adapter_weight_decay=3.0)
    assert torch.equal(body, slow_body) and torch.equal(body, decayed_body)
    assert slow.abs().max() < 1e-4 * moved.abs().max()
    start = network().head.weight.detach()
    assert (start + decayed).norm() < (start + moved).norm()
