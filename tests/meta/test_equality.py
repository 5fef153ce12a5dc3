"""All tasks in one pass give the same training as separate modules, one task after the other.

The other side shares no code with metalora: per-task tensors, plain formulas, one optimiser for
the shared weights and one per task.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.adapters import LoRAConfig, adapt, adapted_layers
from metalora.meta import Batch, GradientStep, TrainConfig
from tests.meta.given import GivenRounds
from tests.pairs import every_pair

T, D, CLASSES = 3, 6, 3
KINDS = {
    "lora": LoRAConfig(rank=2, alpha=3),
    "lora and heads": LoRAConfig(rank=2, alpha=3, heads=["out"]),
    "symmetric": LoRAConfig(rank=2, alpha=3, symmetric=True, target_modules=["fc"]),
    "last layer": LoRAConfig(target_modules=(), heads=["out"]),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.out = nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, CLASSES)

    def forward(self, x):
        return self.out(self.norm(torch.tanh(self.fc(x))).mean(1))


def rounds(absent: bool):
    """Unsorted, ragged rounds; with ``absent``, some lack a task."""
    torch.manual_seed(3)
    ids = [
        [2, 0, 1, 1, 0, 2, 2, 0],
        [1, 1, 0, 1] if absent else [1, 1, 0, 2],
        [0, 2, 1],
        [2, 2, 0] if absent else [2, 2, 0, 1],
        [1, 0, 2, 1, 1, 0],
    ]
    return GivenRounds(
        [
            Batch(
                torch.randn(len(i), 4, D, dtype=torch.float64),
                torch.randint(CLASSES, (len(i),)),
                torch.tensor(i),
            )
            for i in ids
        ],
        T,
    )


def adapted_net(kind):
    torch.manual_seed(0)
    net = adapt(Net().double(), KINDS[kind], T)
    for layer in adapted_layers(net).values():
        for parameter in layer.own_task_parameters().values():
            nn.init.normal_(parameter, std=0.3)
    return net


class Separate:
    """The same weights as ``net``, each task's own tensors kept apart."""

    def __init__(self, net, kind, make_optimizer):
        stacked = {
            f"{name}.{p}"
            for name, layer in adapted_layers(net).items()
            for p in layer.own_task_parameters()
        }
        state = {k: v.detach().clone() for k, v in net.named_parameters()}
        leaf = lambda tensor: tensor.clone().requires_grad_()  # noqa: E731
        self.shared = {k: leaf(v) for k, v in state.items() if k not in stacked}
        self.own = [{k: leaf(state[k][t]) for k in stacked} for t in range(T)]
        self.scaling = 1.5 if "last" not in kind else 0.0
        self.optimizers = [
            make_optimizer(list(part.values())) for part in [self.shared, *self.own] if part
        ]

    def linear(self, x, name, t):
        own = self.own[t]
        if f"{name}.weight" in own:
            return x @ own[f"{name}.weight"].T + own[f"{name}.bias"]
        weight = self.shared[f"{name}.weight"]
        if f"{name}.lora_A" in own:
            weight = weight + self.scaling * own[f"{name}.lora_B"] @ own[f"{name}.lora_A"]
        if f"{name}.lora_U" in own:
            weight = weight + self.scaling * own[f"{name}.lora_U"] @ own[f"{name}.lora_U"].T
        return x @ weight.T + self.shared[f"{name}.bias"]

    def loss(self, batch, t):
        mine = batch.task_ids == t
        x = torch.tanh(self.linear(batch.inputs[mine], "fc", t))
        x = F.layer_norm(x, (D,), self.shared["norm.weight"], self.shared["norm.bias"]).mean(1)
        return F.cross_entropy(self.linear(x, "out", t), batch.targets[mine])

    def step(self, batch, present, clip):
        """One step on the tasks ``present``; of the optimisers, those that have gradients move."""
        losses = [self.loss(batch, t) for t in present]
        for loss in losses:  # one task after the other
            (loss / len(present)).backward()
        everything = [p for part in [self.shared, *self.own] for p in part.values()]
        if clip is not None:
            nn.utils.clip_grad_norm_(everything, clip)
        for optimizer in self.optimizers:
            optimizer.step()  # parameters without a gradient stay as they are
            optimizer.zero_grad(set_to_none=True)
        return sum(loss.item() for loss in losses) / len(losses)

    def assert_equal(self, net):
        for name, parameter in net.named_parameters():
            if name in self.shared:
                want = self.shared[name]
            else:
                want = torch.stack([own[name] for own in self.own])
            torch.testing.assert_close(parameter, want, rtol=0, atol=1e-10, msg=name)


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.02),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.02),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, weight_decay=0.02),
}


@every_pair(
    optimizer=OPTIMIZERS,
    step_per=["round", "task"],
    absent=[False, True],
    kind=KINDS,
)
def test_all_tasks_at_once_equal_task_by_task(kind, absent, step_per, optimizer):
    net, clip = adapted_net(kind), 0.5
    separate = Separate(net, kind, OPTIMIZERS[optimizer])
    loader = rounds(absent)
    config = TrainConfig(
        epochs=1,
        lr=0.01,
        weight_decay=0.02,
        optimizer=optimizer,
        step_per=step_per,
        grad_clip=clip,
    )
    step = GradientStep(net, loader, config)
    taken = step.split(loader)
    count = 0
    for _ in range(2):
        for batch in loader:
            present = sorted(set(batch.task_ids.tolist()))
            for tasks_of_step in [present] if step_per == "round" else [[t] for t in present]:
                want = separate.step(batch, tasks_of_step, clip)
                try:
                    parts = next(taken)
                except StopIteration:
                    taken = step.split(loader)
                    parts = next(taken)
                assert float(step(parts)) == pytest.approx(want, rel=0, abs=1e-12)
                separate.assert_equal(net)
                count += 1
    assert count == 2 * step.per_epoch(loader)


def test_the_comparison_would_notice_a_wrong_task():
    net = adapted_net("lora")
    separate = Separate(net, "lora", OPTIMIZERS["adam"])
    separate.assert_equal(net)
    with torch.no_grad():
        net.fc.lora_A.copy_(net.fc.lora_A.flip(0))
    with pytest.raises(AssertionError):
        separate.assert_equal(net)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_an_absent_task_does_not_move(optimizer):
    net, loader = adapted_net("lora and heads"), rounds(absent=True)
    config = TrainConfig(epochs=1, lr=0.1, weight_decay=0.1, optimizer=optimizer)
    step = GradientStep(net, loader, config)
    step([loader.batches[0]])  # gives every task momentum
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    step([loader.batches[1]])  # without task 2
    for name, parameter in net.named_parameters():
        moved = [not torch.equal(a, b) for a, b in zip(parameter, before[name], strict=True)]
        if name.startswith("out.") or "lora" in name:
            assert moved == [True, True, False], name
        else:
            assert all(moved), name


@pytest.mark.parametrize("absent", [False, True])
def test_complete_rounds_are_stepped_as_whole_tensors(absent):
    net, loader = adapted_net("lora"), rounds(absent)
    step = GradientStep(net, loader, TrainConfig(epochs=1, lr=0.1))
    for batch in loader:
        step([batch])
    stepped = [p for group in step.optimizer.inner.param_groups for p in group["params"]]
    every = list(net.parameters())
    assert sum(len(group["params"]) for group in step.optimizer.param_groups) == len(every)
    own = 4  # lora_A and lora_B of two layers, whose tasks are taken apart once one is absent
    assert len(stepped) == len(every) + (T - 1) * own * absent
