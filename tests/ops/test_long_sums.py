"""Gradients that sum over many rows or many tasks lose no more than plain PyTorch's do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from metalora import reference
from metalora.ops import _native
from tests.ops.long_sums import EPS, KINDS, addends, factors, worst
from tests.pairs import every_pair

pytestmark = pytest.mark.usefixtures("native")

ROWS = {"tasks": [1] * 2500, "rows": [100_000]}
SIZES = {"small": (5, 4, 1), "large": (65, 2, 1)}  # in, out, rank: below and above kSmall


def worst_of(
    got: Sequence[Tensor],
    plain: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
) -> float:
    """`worst` of gradients that a function of the reference computes from these inputs."""

    def run(change: Callable[[Tensor], Tensor]) -> list[Tensor]:
        gradients = plain(*(None if t is None else change(t) for t in inputs))
        return [g for g in gradients if g is not None]

    return worst(got, run(Tensor.clone), run(Tensor.double), run(lambda t: t.double().abs()))


@every_pair(
    kind=KINDS,
    size=SIZES,
    rows=ROWS,
    route=["token", "weight"],
)
def test_lora_linear(route: str, rows: str, size: str, kind: str) -> None:
    in_features, out_features, rank = SIZES[size]
    tasks, total = len(ROWS[rows]), sum(ROWS[rows])
    x, grad_y = factors(kind, total, in_features), addends(kind, total, out_features)
    weight = torch.randn(out_features, in_features)
    lora_A = factors(kind, tasks, rank, in_features)
    lora_B = factors(kind, tasks, out_features, rank)
    task_ptr = torch.tensor([0, *ROWS[rows]]).cumsum(0)
    saved = (grad_y, x, weight, lora_A, lora_B, task_ptr)
    if route == "weight":
        backward = _native.raw("lora_linear_weight_backward")
        got = backward(*saved, 0.5, None, False, *[True] * 5)
    else:
        forward, backward = map(_native.raw, ("lora_linear_token", "lora_linear_token_backward"))
        options = (0.5, 0.0, None, False)
        _, *kept = forward(x, weight, None, lora_A, lora_B, task_ptr, *options)
        got = backward(*saved, *kept, *options, *[True] * 5, None)

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        return reference.lora_linear_backward(*tensors, task_ptr, 0.5)

    assert worst_of(got, plain, saved[:5]) <= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [15, 16, 17, 32, 2500])
def test_merge_lora(tasks: int, kind: str) -> None:
    grad, lora_A = addends(kind, tasks, 6, 6), factors(kind, tasks, 2, 6)
    lora_B = factors(kind, tasks, 6, 2)
    got = _native.raw("merge_lora_backward")(grad, lora_A, lora_B, 0.5, False)
    inputs = (grad, lora_A, lora_B)
    assert worst_of(got, lambda *t: reference.merge_lora_backward(*t, 0.5), inputs) <= 1
    got = _native.raw("merge_lora_symmetric_backward")(grad, lora_B, False)
    assert worst_of(got, reference.merge_lora_symmetric_backward, (grad, lora_B)) <= 1


@every_pair(
    kind=KINDS,
    rank=[0, 2],
    shape=[(2500, 3), (1, 100_000)],
)
def test_task_matvec(shape: tuple[int, int], rank: int, kind: str) -> None:
    tasks, samples = shape
    x = factors(kind, tasks, samples, 6)
    grad_y = addends(kind, tasks * samples, 6).view(tasks, samples, 6)
    weight = torch.randn((6, 6) if rank else (tasks, 6, 6))
    lora_U = factors(kind, tasks, 6, rank) if rank else None
    inputs = (grad_y, weight, x, lora_U)
    got = _native.raw("task_matvec_backward")(*inputs, True, True, bool(rank))
    assert worst_of(got[: 3 if rank else 2], reference.task_matvec_backward, inputs) <= 1


def steps_of(
    name: str, plain: Callable[..., tuple[Tensor, ...]], tensors: Sequence[Tensor], *numbers: float
) -> float:
    """`worst` of what one training ends with, where that is a multiple of a gradient."""
    got = _native.raw(name)(*tensors, *numbers)[:-1]  # all but the step of divergence
    usual = plain(*tensors, *numbers)[:-1]
    exact = plain(*(t.double() for t in tensors), *numbers)[:-1]
    kept = [i for i, right in enumerate(exact) if right.norm() > 0]
    assert len(kept) >= 2
    return worst(*([values[i] for i in kept] for values in (got, usual, exact, exact)))


def test_trainers_of_the_linear_model() -> None:
    gram = (torch.eye(3) + 0.1).expand(1, 2500, 3, 3) * 9
    cross, energy = torch.full((1, 2500, 3, 3), 0.9), torch.full((1, 2500), 0.1)
    start, factors_ = torch.zeros(1, 3, 3), torch.full((1, 2500, 3, 1), 0.1)
    name, plain = "linear_lora_ml", reference.linear.lora_ml
    assert steps_of(name, plain, (gram, cross, energy, start, factors_), 9, 1, 1, 0.1, 0.1) <= 1
    name, plain = "linear_standard", reference.linear.standard
    assert steps_of(name, plain, (gram, cross, energy, start), 9, 1, 0.1) <= 1


@pytest.mark.parametrize("shape", [(2500, 2), (1, 100_000)], ids=str)
def test_trainer_of_the_shallow_network(shape: tuple[int, int]) -> None:
    """With c = 0 only c has a gradient; AdamW's step is proportional to it where eps is large."""
    x, y = torch.full((1, *shape, 2), 0.1), torch.full((1, *shape), 0.3)
    tensors = (x, y, torch.zeros(1, 2, 2), torch.zeros(1, 2))

    def plain(*arguments: Any) -> tuple[Tensor, ...]:
        return reference.shallow.retrain(*arguments[:4], None, None, *arguments[4:])

    adamw = (1, 1e3, 0.9, 0.999, 1e6, 0.0)
    got = _native.raw("shallow_retrain")(*tensors, None, None, *adamw)
    usual, exact = plain(*tensors, *adamw), plain(*(t.double() for t in tensors), *adamw)
    output_and_losses = ([values[1], values[4]] for values in (got, usual, exact, exact))
    assert worst(*output_and_losses) <= 1


def test_the_comparison_finds_a_sum_in_sequence() -> None:
    values = addends("constant", 2500, 4)
    in_sequence = torch.zeros(4)
    for row in values:
        in_sequence += row
    exact, size = values.double().sum(0), values.abs().sum(0)
    assert worst([in_sequence], [values.sum(0)], [exact], [size]) > 5
    assert worst([exact.float()], [values.sum(0)], [exact], [size]) <= 1
    assert worst([exact.float() * (1 + 100 * EPS)], [exact.float()], [exact], [size]) > 5
