"""The CUDA operators against metalora.reference in float64, on the host: see tests/shim."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from metalora import reference
from metalora.ops import _native
from tests.cuda.places import misaligned
from tests.ops.long_sums import KINDS, addends, factors, worst
from tests.ops.problems import relative_error
from tests.ops.raw_calls import defined_operators, has_kernel

pytestmark = pytest.mark.slow

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16

# T, out, in, r
SIZES = [(1, 1, 1, 1), (3, 7, 5, 2), (2, 33, 130, 9), (3, 65, 136, 17), (2, 3, 40, 130)]
# (weight, adapters; merged weights or their gradients)
TYPES = [(F64, F64), (F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16)]
# T, d, k
SQUARE_SIZES = [(1, 1, 1), (3, 33, 2), (2, 136, 9)]
# T, n, in, out
MATVEC_SIZES = [(1, 1, 1, 1), (3, 50, 10, 10), (2, 300, 7, 13), (2, 70, 64, 64), (1, 3, 1, 64)]
# T, n, d, k
SYMMETRIC_MATVEC_SIZES = [(1, 1, 1, 1), (3, 100, 10, 2), (2, 70, 64, 3), (2, 5, 33, 40)]

TF32 = pytest.mark.parametrize("tf32", [False, True], ids=["ieee", "tf32"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN, or the largest number."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(before)


def names(types: tuple[torch.dtype, torch.dtype]) -> str:
    return "-".join(str(dtype).removeprefix("torch.") for dtype in types)


def adapters(size: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    tasks, out, in_, rank = size
    shapes = ((out, in_), (tasks, rank, in_), (tasks, out, rank))
    weight, lora_A, lora_B = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return weight, lora_A, lora_B


def check(
    run: Callable[..., Any],
    plain: Callable[..., Any],
    inputs: Sequence[Tensor | None],
    to: torch.dtype,
    tf32: bool = False,
) -> None:
    """run(*inputs) must be as right as plain PyTorch, the same again, and leave inputs alone.

    ``plain`` runs in float64, and in the dtype of the inputs for comparison; ``to`` is the dtype of
    the results.
    """
    copies = [None if t is None else t.clone() for t in inputs]
    got = as_tuple(run(*inputs))
    exact = as_tuple(plain(*(None if t is None else t.double() for t in inputs)))
    widest = max((to, *(t.dtype for t in inputs if t is not None)), key=lambda d: d.itemsize)
    usual = as_tuple(plain(*(None if t is None else t.to(widest) for t in inputs)))
    for result, right, other in zip(got, exact, usual, strict=True):
        assert result.dtype == to
        assert result.shape == right.shape
        limit = 1e-12
        if to != F64:
            floor = max(torch.finfo(to).eps, 2.0**-10 if tf32 else 0.0)
            limit = max(2 * relative_error(other.to(to), right), floor)
        assert relative_error(result, right) <= limit
    for tensor, copy in zip(inputs, copies, strict=True):
        assert copy is None or (tensor is not None and torch.equal(tensor, copy))
    os.environ["METALORA_SHIM_ORDER"] = "reverse"
    again = as_tuple(run(*inputs))
    del os.environ["METALORA_SHIM_ORDER"]
    for first, second in zip(got, again, strict=True):
        assert torch.equal(first, second)


def as_tuple(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(r for r in result if r is not None)


# On a GPU packed sequences take torch's own attention, see metalora/hf/attention.py.
FOR_CPUS = {"packed_attention", "packed_attention_backward"}


def test_every_operator_has_a_cuda_kernel(shim_operators: Any) -> None:
    defined = defined_operators("metalora_shim")
    assert defined == set(_native.operators)
    assert {name for name in defined if not has_kernel("metalora_shim", name)} == FOR_CPUS


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=names)
@TF32
def test_merge_lora(shim_operators: Any, size, types, tf32: bool) -> None:
    dtype, to = types
    check(
        lambda *t: shim_operators.merge_lora(*t, 0.7, to, tf32),
        lambda *t: reference.merge_lora(*t, 0.7),
        adapters(size, dtype),
        to,
        tf32,
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=names)
@TF32
def test_merge_lora_backward(shim_operators: Any, size, types, tf32: bool) -> None:
    dtype, of_grad = types
    _, lora_A, lora_B = adapters(size, dtype)
    grad = torch.randn(size[:3], dtype=of_grad)
    check(
        lambda *t: shim_operators.merge_lora_backward(*t, 0.7, tf32),
        lambda *t: reference.merge_lora_backward(*t, 0.7),
        (grad, lora_A, lora_B),
        dtype,
        tf32,
    )


@pytest.mark.parametrize("size", SQUARE_SIZES, ids=str)
@pytest.mark.parametrize("types", TYPES, ids=names)
@TF32
def test_symmetric(shim_operators: Any, size, types, tf32: bool) -> None:
    dtype, to = types
    tasks, d, k = size
    lora_U = torch.randn(tasks, d, k, dtype=dtype)
    check(
        lambda *t: shim_operators.merge_lora_symmetric(*t, to, tf32),
        reference.merge_lora_symmetric,
        (torch.randn(d, d, dtype=dtype), lora_U),
        to,
        tf32,
    )
    check(
        lambda *t: shim_operators.merge_lora_symmetric_backward(*t, tf32),
        reference.merge_lora_symmetric_backward,
        (torch.randn(tasks, d, d, dtype=to), lora_U),
        dtype,
        tf32,
    )


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("size", MATVEC_SIZES, ids=str)
def test_task_matvec(shim_operators: Any, size, dtype: torch.dtype) -> None:
    tasks, samples, in_, out = size
    weight = torch.randn(tasks, out, in_, dtype=dtype)
    x = torch.randn(tasks, samples, in_, dtype=dtype)
    grad_y = torch.randn(tasks, samples, out, dtype=dtype)
    check_matvec(shim_operators, weight, x, None, grad_y)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("size", SYMMETRIC_MATVEC_SIZES, ids=str)
def test_symmetric_task_matvec(shim_operators: Any, size, dtype: torch.dtype) -> None:
    tasks, samples, d, k = size
    x, grad_y = torch.randn(2, tasks, samples, d, dtype=dtype)
    weight, lora_U = torch.randn(d, d, dtype=dtype), torch.randn(tasks, d, k, dtype=dtype)
    check_matvec(shim_operators, weight, x, lora_U, grad_y)


def check_matvec(
    operators: Any, weight: Tensor, x: Tensor, lora_U: Tensor | None, grad_y: Tensor
) -> None:
    check(operators.task_matvec, reference.task_matvec, (weight, x, lora_U), x.dtype)
    inputs = (grad_y, weight, x, lora_U)
    needed = (True, True, lora_U is not None)
    gradients = reference.task_matvec_backward(*inputs)
    check(
        lambda *t: operators.task_matvec_backward(*t, *needed)[: sum(needed)],
        reference.task_matvec_backward,
        inputs,
        x.dtype,
    )
    for one in range(sum(needed)):
        alone = operators.task_matvec_backward(*inputs, *(i == one for i in range(3)))
        assert relative_error(alone[one], gradients[one]) < 1e-5
        assert all(other.numel() == 0 for i, other in enumerate(alone) if i != one)


@pytest.mark.parametrize("seed", [0, 2**40 + 12345, 2**63 - 1])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (37, 53), (2, 1024), (0, 4), (7, 0)])
def test_dropout_mask(shim_operators: Any, seed: int, shape: tuple[int, int]) -> None:
    got = shim_operators.dropout_mask(torch.tensor(seed), 0.3, *shape)
    assert got.dtype == torch.bool
    assert torch.equal(got, reference.dropout_mask(torch.tensor(seed), 0.3, *shape))


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
def test_misaligned_and_strided_inputs(shim_operators: Any, dtype: torch.dtype) -> None:
    inputs = adapters((2, 24, 32, 8), dtype)
    grad = torch.randn(2, 24, 32, dtype=dtype)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in inputs]
    for changed in ([misaligned(t) for t in inputs], strided):
        assert torch.equal(
            shim_operators.merge_lora(*changed, 1.0, None, False),
            shim_operators.merge_lora(*inputs, 1.0, None, False),
        )
    for a, b in zip(
        shim_operators.merge_lora_backward(misaligned(grad), *strided[1:], 1.0, False),
        shim_operators.merge_lora_backward(grad, *inputs[1:], 1.0, False),
        strict=True,
    ):
        assert torch.equal(a, b)


@TF32
def test_nan_stays_in_its_task(shim_operators: Any, tf32: bool) -> None:
    weight, lora_A, lora_B = adapters((3, 20, 40, 9), F32)
    grad = torch.randn(3, 20, 40)
    lora_A[1, 2, 3] = float("nan")
    grad[1, 4, 5] = float("inf")
    merged = shim_operators.merge_lora(weight, lora_A, lora_B, 1.0, None, tf32)
    wanted = reference.merge_lora(weight, lora_A, lora_B)
    assert torch.equal(merged.isnan(), wanted.isnan())
    _, grad_A, grad_B = shim_operators.merge_lora_backward(grad, lora_A, lora_B, 1.0, tf32)
    for gradient in (grad_A, grad_B):
        assert gradient[[0, 2]].isfinite().all()
        assert not gradient[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_sums_over_many_tasks(shim_operators: Any, kind: str) -> None:
    def check_sums(got: Any, plain: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
        changes = (Tensor.clone, Tensor.double, lambda t: t.double().abs())
        assert worst(got, *(plain(*map(change, inputs)) for change in changes)) <= 1

    grad, lora_A = addends(kind, 600, 3, 4), factors(kind, 600, 1, 4)
    lora_B = factors(kind, 600, 3, 1)
    got = shim_operators.merge_lora_backward(grad, lora_A, lora_B, 0.5, False)
    inputs = (grad, lora_A, lora_B)
    check_sums(got, lambda *t: reference.merge_lora_backward(*t, 0.5), inputs)
    grad_y, weight = addends(kind, 1200, 4).view(600, 2, 4), torch.randn(4, 4)
    inputs = (grad_y, weight, factors(kind, 600, 2, 4), factors(kind, 600, 4, 1))
    got = shim_operators.task_matvec_backward(*inputs, True, True, True)
    check_sums(got, reference.task_matvec_backward, inputs)
