from __future__ import annotations

import re

import pytest
import torch

from metalora import ops
from tests.ops.problems import relative_error

SIZES = [
    (1, 1, 1, 1),
    (3, 50, 10, 10),
    (2, 100, 7, 13),
    (4, 0, 5, 5),
    (2, 70, 64, 64),
    (2, 9, 65, 70),
]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_agrees_with_einsum(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    tasks, samples, in_features, out_features = size
    weight = torch.randn(tasks, out_features, in_features, dtype=dtype, requires_grad=True)
    x = torch.randn(tasks, samples, in_features, dtype=dtype, requires_grad=True)
    got = ops.task_matvec(weight, x)
    wanted = torch.einsum("toi,tni->tno", weight.double(), x.double())
    limit = 1e-12 if dtype == torch.float64 else 1e-5
    assert got.dtype == dtype
    assert relative_error(got, wanted) < limit
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [weight, x], grad),
        torch.autograd.grad(wanted, [weight, x], grad.double()),
        strict=True,
    ):
        assert relative_error(a, b) < limit


@pytest.mark.parametrize(
    "size", [(1, 1, 1, 1), (3, 100, 10, 2), (2, 70, 64, 3), (2, 5, 80, 9)], ids=str
)
def test_symmetric_form_agrees_with_einsum(size: tuple[int, int, int, int]) -> None:
    tasks, samples, d, k = size
    leaves = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((d, d), (tasks, samples, d), (tasks, d, k))
    ]
    weight, x, lora_U = leaves
    got = ops.task_matvec(weight, x, lora_U)
    full = weight + torch.einsum("tik,tjk->tij", lora_U, lora_U)
    wanted = torch.einsum("tij,tnj->tni", full, x)
    assert relative_error(got, wanted) < 1e-12
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("mask", range(1, 8))
def test_gradcheck_and_gradgradcheck(symmetric: bool, mask: int) -> None:
    shapes = [(3, 3), (2, 4, 3), (2, 3, 2)] if symmetric else [(2, 5, 3), (2, 4, 3)]
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=bool(mask >> i & 1))
        for i, s in enumerate(shapes)
    ]
    if not any(leaf.requires_grad for leaf in leaves):
        pytest.skip("nothing needs grad")
    assert torch.autograd.gradcheck(ops.task_matvec, leaves)
    assert torch.autograd.gradgradcheck(ops.task_matvec, leaves)


def test_opcheck(native: None) -> None:
    raw = torch.ops.metalora
    weight, x, lora_U = torch.randn(6, 6), torch.randn(2, 5, 6), torch.randn(2, 6, 2)
    torch.library.opcheck(raw.task_matvec.default, (weight, x, lora_U))
    torch.library.opcheck(raw.task_matvec.default, (torch.randn(2, 4, 6), x, None))
    torch.library.opcheck(
        raw.task_matvec_backward.default,
        (torch.randn(2, 5, 6), weight, x, lora_U, True, False, True),
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((torch.randn(3, 3), torch.randn(2, 4, 3)), "weight must be [T=2, out, in=3], got [3, 3]"),
        ((torch.randn(2, 3, 4), torch.randn(2, 4, 3)), "got [2, 3, 4]"),
        (
            (torch.randn(3, 3), torch.randn(2, 4, 3), torch.randn(2, 2, 3)),
            "lora_U must be [T=2, d=3, k], got [2, 2, 3]; is it transposed?",
        ),
        ((torch.randn(2, 3, 3), torch.randn(4, 3)), "x must be [T, n, in], got [4, 3]"),
    ],
)
def test_messages(arguments, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        ops.task_matvec(*arguments)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [64, 65])
def test_autocast_changes_nothing_at_any_size(size: int, symmetric: bool) -> None:
    weight = torch.randn(*([] if symmetric else [2]), size, size, requires_grad=True)
    x, lora_U = torch.randn(2, 3, size), torch.randn(2, size, 2) if symmetric else None
    wanted = ops.task_matvec(weight, x, lora_U)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.task_matvec(weight, x, lora_U)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)


def test_autocast_leaves_gradients_that_can_be_differentiated(native: None) -> None:
    weight, x = torch.randn(9, 9, requires_grad=True), torch.randn(2, 3, 9)
    lora_U = torch.randn(2, 9, 2)
    found = []
    for enabled in (False, True):
        value = ops.task_matvec(weight, x, lora_U).square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found += torch.autograd.grad(value, weight, create_graph=True)
    assert torch.equal(*found)
