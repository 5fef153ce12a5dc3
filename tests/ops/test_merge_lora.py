from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor

from metalora import ops
from tests.ops.problems import relative_error

SIZES = [(1, 1, 1, 1), (3, 7, 5, 2), (2, 33, 130, 9), (4, 150, 20, 1)]  # T, out, in, r


def matrices(size: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    tasks, out_features, in_features, rank = size
    shapes = [(out_features, in_features), (tasks, rank, in_features), (tasks, out_features, rank)]
    return [torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_merge_lora_agrees_with_einsum(size: tuple[int, int, int, int]) -> None:
    weight, lora_A, lora_B = matrices(size)
    wanted = weight + 0.7 * torch.einsum("tor,tri->toi", lora_B, lora_A)
    got = ops.merge_lora(weight, lora_A, lora_B, 0.7)
    assert relative_error(got, wanted) < 1e-12
    grad = torch.randn_like(got)
    leaves = [weight, lora_A, lora_B]
    for a, b in zip(
        torch.autograd.grad(got, leaves, grad),
        torch.autograd.grad(wanted, leaves, grad),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 7, 2), (2, 130, 9)], ids=str)
def test_symmetric_agrees_with_einsum(size: tuple[int, int, int]) -> None:
    tasks, d, k = size
    weight = torch.randn(d, d, dtype=torch.float64, requires_grad=True)
    lora_U = torch.randn(tasks, d, k, dtype=torch.float64, requires_grad=True)
    wanted = weight + torch.einsum("tik,tjk->tij", lora_U, lora_U)
    got = ops.merge_lora_symmetric(weight, lora_U)
    assert relative_error(got, wanted) < 1e-12
    grad = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, [weight, lora_U], grad),
        torch.autograd.grad(wanted, [weight, lora_U], grad),
        strict=True,
    ):
        assert relative_error(a, b) < 1e-12


@pytest.mark.parametrize("mask", range(1, 8))
def test_gradcheck_and_gradgradcheck(mask: int) -> None:
    leaves = matrices((2, 3, 4, 2))
    for i, leaf in enumerate(leaves):
        leaf.requires_grad_(bool(mask >> i & 1))
    assert torch.autograd.gradcheck(lambda *t: ops.merge_lora(*t, 0.5), leaves)
    assert torch.autograd.gradgradcheck(lambda *t: ops.merge_lora(*t, 0.5), leaves)


@pytest.mark.parametrize("mask", range(1, 4))
def test_symmetric_gradcheck_and_gradgradcheck(mask: int) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64, requires_grad=bool(mask & 1))
    lora_U = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=bool(mask & 2))
    assert torch.autograd.gradcheck(ops.merge_lora_symmetric, (weight, lora_U))
    assert torch.autograd.gradgradcheck(ops.merge_lora_symmetric, (weight, lora_U))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_short_dtypes_round_once(dtype: torch.dtype) -> None:
    short = matrices((3, 40, 50, 4), dtype)
    got = ops.merge_lora(*short, 0.5)
    exact = ops.merge_lora(*[t.double() for t in short], 0.5)
    assert got.dtype == dtype
    assert relative_error(got, exact) < 2 * torch.finfo(dtype).eps


def test_strided_inputs() -> None:
    weight, lora_A, lora_B = (t.detach() for t in matrices((3, 7, 5, 2)))
    strided = [
        weight.t().contiguous().t(),
        lora_A.transpose(1, 2).contiguous().transpose(1, 2),
        lora_B.transpose(1, 2).contiguous().transpose(1, 2),
    ]
    assert torch.equal(ops.merge_lora(*strided), ops.merge_lora(weight, lora_A, lora_B))


def test_opcheck(native: None) -> None:
    weight, lora_A, lora_B = (t.detach() for t in matrices((2, 6, 6, 2), torch.float32))
    raw = torch.ops.metalora
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(raw.merge_lora.default, (weight, lora_A, lora_B, 0.5, dtype, False))
        torch.library.opcheck(raw.merge_lora_symmetric.default, (weight, lora_B, dtype, False))
        grad = torch.randn(2, 6, 6, dtype=dtype)
        torch.library.opcheck(raw.merge_lora_backward.default, (grad, lora_A, lora_B, 0.5, False))
        torch.library.opcheck(raw.merge_lora_symmetric_backward.default, (grad, lora_B, False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float_weights_may_be_merged_into_a_short_dtype(dtype: torch.dtype) -> None:
    leaves = matrices((3, 40, 50, 4), torch.float32)
    got = ops.merge_lora(*leaves, 0.5, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, ops.merge_lora(*leaves, 0.5).to(dtype))  # rounded once
    grad = torch.randn_like(got)
    gradients = torch.autograd.grad(got, leaves, grad)
    wanted = torch.autograd.grad(ops.merge_lora(*leaves, 0.5), leaves, grad.float())
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == torch.float32
        assert relative_error(a, b) < 1e-6
    square = torch.randn(40, 40)
    got = ops.merge_lora_symmetric(square, leaves[2].detach(), dtype=dtype)
    assert torch.equal(got, ops.merge_lora_symmetric(square, leaves[2].detach()).to(dtype))


def test_other_dtypes_are_refused() -> None:
    weight, lora_A, lora_B = matrices((2, 6, 6, 2))
    wanted = r"dtype must be that of weight, torch.float64, or .*, got torch.float16"
    with pytest.raises(TypeError, match=r"merge_lora: " + wanted):
        ops.merge_lora(weight, lora_A, lora_B, dtype=torch.float16)
    with pytest.raises(TypeError, match=r"merge_lora_symmetric: " + wanted):
        ops.merge_lora_symmetric(weight, lora_B, dtype=torch.float16)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ((1, torch.randn(2, 3, 9)), ValueError, "lora_A must be [T, r, in=5], got [2, 3, 9]"),
        (
            (2, torch.randn(2, 2, 7)),
            ValueError,
            "lora_B must be [T=2, out=7, r=2], got [2, 2, 7]; is it transposed?",
        ),
        ((0, torch.ones(7, 5, dtype=torch.int32)), TypeError, "weight must be floating point"),
        ((2, torch.randn(2, 7, 2).double()), TypeError, "lora_B must have the dtype of weight"),
        ((1, None), TypeError, "lora_A must be a tensor, got NoneType"),
        ((3, "1"), TypeError, "scaling must be a number, got str"),
        ((3, float("inf")), ValueError, "scaling must be finite, got inf"),
    ],
)
def test_messages(change, kind, text) -> None:
    arguments = [*(t.detach() for t in matrices((2, 7, 5, 2), torch.float32)), 1.0]
    arguments[change[0]] = change[1]
    with pytest.raises(kind, match=re.escape(text)):
        ops.merge_lora(*arguments)


def test_rank_zero_is_refused() -> None:
    weight = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"merge_lora: lora_A must have a rank of at least 1"):
        ops.merge_lora(weight, torch.empty(2, 0, 4), torch.empty(2, 4, 0))
    with pytest.raises(ValueError, match=r"merge_lora_symmetric: lora_U must have a rank"):
        ops.merge_lora_symmetric(weight, torch.empty(2, 4, 0))
    with pytest.raises(ValueError, match=r"task_matvec: lora_U must have a rank"):
        ops.task_matvec(weight, torch.randn(2, 3, 4), torch.empty(2, 4, 0))


@pytest.mark.parametrize("native", [True, False])
def test_autocast_changes_nothing(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not native:
        module = sys.modules["metalora.ops.merge_lora"]
        monkeypatch.setattr(module, "usable", lambda tensor: False)
    arguments = matrices((2, 33, 20, 3), torch.float32)
    lora_U = torch.randn(2, 9, 2)
    wanted = ops.merge_lora(*arguments), ops.merge_lora_symmetric(torch.eye(9), lora_U)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.merge_lora(*arguments), ops.merge_lora_symmetric(torch.eye(9), lora_U)
    for got, want in zip(found, wanted, strict=True):
        assert torch.equal(got, want)
