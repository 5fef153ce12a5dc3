"""Two and three processes train as one does, step for step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from metalora.adapters import LoRAConfig
from metalora.meta import (
    Batch,
    Callback,
    Distribution,
    KeepBest,
    RoundLoader,
    TrainConfig,
    by_task,
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    reptile,
    standard,
)
from tests.processes import needs_gloo, run_processes

pytestmark = [pytest.mark.slow, needs_gloo]
T, D = 5, 6
COUNTS = [13, 4, 9, 1, 6]  # ragged: rounds of 4 have all tasks, then four, three, one
LORA = LoRAConfig(rank=2, alpha=3, dropout=0.3, target_modules=["0", "5"])
WITH_HEADS = LoRAConfig(rank=2, target_modules=["0", "3"], heads=["5"])


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(D, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)
    ).double()


def rounds(seed: int = 0, counts: list[int] = COUNTS, **options: Any) -> RoundLoader:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    ids = ids[torch.randperm(len(ids), generator=generator)]
    inputs = torch.randn(len(ids), D, dtype=torch.float64, generator=generator)
    targets = torch.randint(3, ids.shape, generator=generator)
    return RoundLoader(inputs, targets, ids, **{"batch_size": 4, "seed": seed, **options})


class Weights(Callback):
    """Keeps the loss, the shared weights and the tasks' own after every step."""

    def on_start(self, training: Any) -> None:
        self.seen: list[Any] = []

    def on_step(self, training: Any, loss: torch.Tensor) -> None:
        own = {id(p) for p in training.step.own}
        found: list[Any] = [loss.clone(), {}, {}]
        tasks = training.distribution.tasks
        for name, p in training.model.named_parameters():
            if id(p) not in own:
                found[1][name] = p.detach().clone()
            for i, task in enumerate(tasks if id(p) in own else []):
                found[2][name, task] = p.detach()[i].clone()
        self.seen.append(found)


def passes_of_two(batch: Batch) -> Any:
    for rows in torch.arange(len(batch.targets)).split(2):
        yield batch.take(rows)


# Per name the method, its fields of TrainConfig, and keywords of the loader.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "lora-ml": (
        lambda *a, **o: lora_ml(*a, LORA, **o),
        {"grad_clip": 0.5, "weight_decay": 0.1, "optimizer": "adamw", "epochs": 2},
        {},
    ),
    "lora-ml with heads": (
        lambda *a, **o: lora_ml(*a, WITH_HEADS, **o),
        {"adapter_steps": 2, "optimizer": "sgd", "grad_clip": 0.2},
        {"collate": passes_of_two},
    ),
    "lora-ml over samples": (
        lambda *a, **o: lora_ml(*a, LORA, **o),
        {"optimizer": "sgd"},
        {"order": "proportional", "weighting": "samples"},
    ),
    "lora-ml per task": (lambda *a, **o: lora_ml(*a, LORA, **o), {"step_per": "task"}, {}),
    "one task at a time": (
        lambda model, loader, *a, **o: lora_ml(model, by_task(loader), *a, LORA, **o),
        {"optimizer": "sgd"},
        {},
    ),
    "last-layer-ml": (lambda *a, **o: last_layer_ml(*a, ["5"], **o), {"grad_clip": 0.3}, {}),
    "standard": (standard, {}, {"order": "pooled", "batch_size": 7}),
    "standard in rounds": (standard, {"grad_clip": 0.3}, {"order": "proportional"}),
    "reptile": (
        lambda *a, **o: reptile(*a, inner_steps=2, inner_optimizer="adam", **o),
        {"grad_clip": 0.5},
        {},
    ),
    "reptile, mean": (lambda *a, **o: reptile(*a, inner_steps=2, average=True, **o), {}, {}),
    "finetune": (lambda *a, **o: finetune_lora(*a, LORA, **o), {"grad_clip": 0.1}, {}),
    "finetune, fresh heads": (
        lambda *a, **o: finetune_lora(*a, WITH_HEADS, fresh_heads=True, **o),
        {"schedule": "linear", "schedule_unit": "step"},
        {},
    ),
    "finetune the last layer": (lambda *a, **o: finetune_last_layer(*a, ["5"], **o), {}, {}),
    "one task": (lambda *a, **o: finetune_lora(*a, LORA, **o), {}, {"counts": [11]}),
}


def trained(case: str, parallel: str | None, *, dropout: bool = True) -> dict[str, Any]:
    method, fields, options = CASES[case]
    config = TrainConfig(**{"epochs": 1, "lr": 0.02, "seed": 3, "parallel": parallel, **fields})
    model, weights = network(), Weights()
    if not dropout:
        model[2].p = 0.0
    result = method(
        model,
        rounds(**options),
        config,
        validation=rounds(7, options.get("counts", COUNTS)),
        callbacks=[KeepBest(), weights],
    )
    return {
        "steps": weights.seen,
        "history": result.history,
        "model": {k: v for k, v in model.state_dict().items() if "lora" not in k},
        "adapters": result.adapters,
        "kept": (result.kept_epoch, result.best_metric),
    }


def every_case() -> dict[tuple[str, str], Any]:
    return {(case, p): trained(case, p) for case in CASES for p in ("data", "tasks")}


@pytest.fixture(scope="module")
def one() -> dict[tuple[str, str], Any]:
    return every_case()


def close(found: Any, wanted: Any, where: str) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=lambda m: f"{where}: {m}")


@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_equal_one(processes: int, one: dict[tuple[str, str], Any]) -> None:
    by_rank = run_processes(every_case, processes)
    for (case, parallel), wanted in one.items():
        found = [by_rank[rank][case, parallel] for rank in range(processes)]
        for rank, own in enumerate(found):
            where = f"{case}, {parallel}, process {rank} of {processes}"
            assert len(own["steps"]) == len(wanted["steps"]), where
            for ours, theirs in zip(own["steps"], wanted["steps"], strict=True):
                close(ours[0], theirs[0], f"{where}, loss")
                for name, value in ours[1].items():
                    close(value, theirs[1][name], f"{where}, {name}")
                for place, value in ours[2].items():
                    close(value, theirs[2][place], f"{where}, {place}")
            assert own["kept"] == wanted["kept"], where
            for ours, theirs in zip(own["history"], wanted["history"], strict=True):
                close(ours["loss"], theirs["loss"], where)
                close(ours["validation_per_task"], theirs["validation_per_task"], where)
        for rank in range(1, processes):  # exchanged sums are the same bits in all processes
            for ours, theirs in zip(found[rank]["steps"], found[0]["steps"], strict=True):
                assert all(torch.equal(v, theirs[1][k]) for k, v in ours[1].items())
        if not case.startswith("finetune") and case != "one task":
            for own in found:
                for name, value in own["model"].items():
                    close(value, wanted["model"][name], f"{case}, {parallel}, {name}")
        holders = [
            [rank for rank in range(processes) if found[rank]["adapters"][task]]
            for task in range(len(wanted["adapters"]))
        ]
        for task, ranks in enumerate(holders):
            assert len(ranks) == (1 if parallel == "tasks" else processes), (case, task)
            for rank in ranks:
                for name, value in found[rank]["adapters"][task].items():
                    close(value, wanted["adapters"][task][name], f"{case}, task {task}, {name}")


def test_without_dropout_one_process_trains_as_ever(one: dict[tuple[str, str], Any]) -> None:
    for case in ("last-layer-ml", "standard", "reptile", "lora-ml with heads"):
        for parallel in ("data", "tasks"):
            ours = trained(case, parallel, dropout=False)
            theirs = trained(case, None, dropout=False)
            for found, wanted in zip(ours["steps"], theirs["steps"], strict=True):
                close(found[1:], wanted[1:], case)
        with_dropout = one[case, "data"]["steps"][-1][0]
        assert abs(float(with_dropout - theirs["steps"][-1][0])) > 1e-6, case


class Checkpointed(nn.Module):
    """Runs its layers again in the backward pass."""

    def __init__(self, layers: nn.Sequential, reentrant: bool | None) -> None:
        super().__init__()
        self.layers, self.reentrant = layers, reentrant

    def forward(self, x: torch.Tensor) -> Any:
        if self.reentrant is None:
            return self.layers(x)
        return checkpoint(self.layers, x.requires_grad_(), use_reentrant=self.reentrant)


def test_layers_that_run_again_have_the_same_masks() -> None:
    lora = LoRAConfig(rank=2, dropout=0.3, target_modules=["0", "5"])
    found = []
    for reentrant in (None, False, True):
        model = Checkpointed(network(), reentrant)
        config = TrainConfig(epochs=1, lr=0.02, parallel="data")
        lora_ml(model, rounds(), config, lora)
        found.append([p.detach() for p in model.parameters()])
    for again in found[1:]:
        assert all(map(torch.equal, again, found[0]))


def test_processes_without_a_group_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but they do not know each"):
        standard(network(), rounds(), TrainConfig(epochs=1, lr=0.1, parallel="data"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parallel": "both"}, "parallel must be one of"),
        ({"parallel": "data", "compile": True}, "compile must be False with parallel"),
        ({"parallel": "tasks", "precision": "fp16"}, "precision must be 'fp32' or 'bf16' with"),
    ],
)
def test_settings_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(epochs=1, lr=0.1, **fields)


def test_tasks_are_spread_by_their_samples() -> None:
    found = Distribution("tasks", [5, 1, 1, 7, 2])
    assert (found.tasks, found.held, found.world_size) == ([0, 1, 2, 3, 4], [0, 1, 2, 3, 4], 1)
    from metalora.meta.distribution import _spread

    assert _spread([5, 1, 1, 7, 2], 2) == [[1, 3], [0, 2, 4]]
    assert _spread([5, 1], 3) == [[0], [1], []]
    assert _spread([3] * 10, 4) == [[0, 4, 8], [1, 5, 9], [2, 6], [3, 7]]
