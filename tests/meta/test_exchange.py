"""The part of a batch that a process takes, and what it makes of gradients it has exchanged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from metalora.meta import Batch, Distribution

COUNTS = (3, 0, 2, 4)


def one_of_two(monkeypatch: pytest.MonkeyPatch, parallel: str, rank: int = 0) -> Distribution:
    """One process of two, of which the other adds nothing to what is exchanged."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: rank)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(Distribution, "_exchange", lambda *args, **options: None)
    return Distribution(parallel, [5, 1, 2, 4])


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_gradients_have_the_memory_format_of_their_parameters(
    kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused optimisers step by the order in memory."""
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 4, 3)
    formatted = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    formatted.load_state_dict(plain.state_dict())
    loss, gradients = torch.zeros(()), [torch.randn_like(p) for p in plain.parameters()]
    for model in (plain, formatted):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        one_of_two(monkeypatch, "data").sum_gradients(list(model.parameters()), loss)
        kind(model.parameters(), lr=0.1, fused=True).step()
    for found, wanted in zip(formatted.parameters(), plain.parameters(), strict=True):
        assert found.grad is not None and found.grad.stride() == found.stride()
        assert torch.equal(found, wanted)


def test_a_parameter_without_a_gradient_anywhere_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    parameters[0].grad = torch.ones(2)
    one_of_two(monkeypatch, "data").sum_gradients(parameters, torch.zeros(()))
    assert torch.equal(parameters[0].grad, torch.ones(2)) and parameters[1].grad is None


@pytest.mark.parametrize("rank", [0, 1])
def test_the_tasks_of_a_process_are_found_without_asking_the_device(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution = one_of_two(monkeypatch, "tasks", rank)
    ids = torch.arange(len(COUNTS)).repeat_interleave(torch.tensor(COUNTS))
    batch = Batch(torch.randn(len(ids), 2), torch.arange(len(ids)), ids, COUNTS)
    wanted = distribution.part(replace(batch, counts=None))
    monkeypatch.setattr(torch.Tensor, "nonzero", None)
    found = distribution.part(batch)
    assert found.counts == tuple(COUNTS[task] for task in distribution.tasks)
    for name in ("inputs", "targets", "task_ids", "weights", "places"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    shorter = distribution.part(replace(batch, counts=COUNTS[:3]).take(slice(0, 5), COUNTS[:3]))
    assert shorter.counts == tuple((*COUNTS[:3], 0)[task] for task in distribution.tasks)
    of_samples = distribution.part(replace(batch, weighting="samples"))
    assert torch.equal(of_samples.weights * len(ids), torch.ones_like(of_samples.weights))


def test_one_process_broadcasts_without_a_tensor() -> None:
    found = Distribution(None, ()).broadcast([True, 2.5], torch.device("meta"))
    assert found == [1.0, 2.5] and all(type(number) is float for number in found)
