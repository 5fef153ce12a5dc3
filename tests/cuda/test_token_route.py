"""The token route's kernels through the shim: every dtype, ranks up to and beyond their limit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from metalora import reference
from metalora._library import native_available
from tests.cuda.places import misaligned
from tests.ops.problems import relative_error
from tests.pairs import every_pair

pytestmark = pytest.mark.slow

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def problem(
    rows: tuple[int, ...], in_: int, out: int, rank: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    tasks, total = len(rows), sum(rows)
    shapes = {"x": (total, in_), "weight": (out, in_), "bias": (out,)}
    shapes |= {"lora_A": (tasks, rank, in_), "lora_B": (tasks, out, rank), "grad_y": (total, out)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@every_pair(
    dtype=DTYPES,
    rank=[1, 3, 8, 9, 16, 17, 64, 65, 128, 130],
    rows=[(70, 70), (5, 0, 66, 1), (129,)],
    sizes=[(24, 40), (33, 17), (8, 72)],
    p=[0.0, 0.3],
    tf32=[False, True],
    adds_to_x=[False, True],
)
def test_agrees_with_the_reference(
    shim_operators: Any,
    dtype: torch.dtype,
    rank: int,
    rows: tuple[int, ...],
    sizes: tuple[int, int],
    p: float,
    tf32: bool,
    adds_to_x: bool,
) -> None:
    given = problem(rows, *sizes, rank, dtype)
    task_ptr = torch.tensor([0, *rows]).cumsum(0)
    grad_y = given.pop("grad_y")
    grad_x = torch.randn_like(given["x"]) if adds_to_x else None
    seed = torch.tensor(11) if p else None
    y, shrunk, kept = shim_operators.lora_linear_token(
        *given.values(), task_ptr, 0.7, p, seed, tf32
    )
    given_backward = [t for name, t in given.items() if name != "bias"]
    found = shim_operators.lora_linear_token_backward(
        *(grad_y, *given_backward, task_ptr, shrunk, kept, 0.7, p, seed, tf32, *[True] * 5),
        grad_x,
    )

    def plain(to: torch.dtype) -> list[Tensor]:
        wide = [t.to(to) for t in given.values()]
        wide_backward = [t.to(to) for t in (grad_y, *given_backward)]
        settings = (task_ptr, 0.7, p, seed)
        own, *others = reference.lora_linear_backward(*wide_backward, *settings)
        if grad_x is not None:
            own += grad_x.to(to)
        return [reference.lora_linear(*wide, *settings), own, *others]

    exact, usual = plain(torch.float64), plain(dtype)
    for got, other, right in zip((y, *found), usual, exact, strict=True):
        assert got.dtype == dtype and got.shape == right.shape
        rounded = tf32 and dtype == torch.float32 and rank <= 128
        floor = 2.0**-10 if rounded else FLOOR[dtype]
        assert relative_error(got, right) <= max(2 * relative_error(other, right), floor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_at_any_address_is_added_to(shim_operators: Any, dtype: torch.dtype) -> None:
    given = problem((70, 70), 24, 40, 8, dtype)
    grad_y = given.pop("grad_y")
    task_ptr, settings = torch.tensor([0, 70, 140]), (0.7, 0.3, torch.tensor(11), False)
    kept = shim_operators.lora_linear_token(*given.values(), task_ptr, *settings)[1:]
    given.pop("bias")
    grad_x = torch.randn_like(given["x"])
    aligned, other = (
        shim_operators.lora_linear_token_backward(
            grad_y, *given.values(), task_ptr, *kept, *settings, *[True] * 5, one
        )[0]
        for one in (grad_x, misaligned(grad_x))
    )
    assert torch.equal(aligned, other)


def test_float32_is_rounded_to_tf32_only_where_that_is_allowed(shim_operators: Any) -> None:
    given = problem((70, 70), 64, 40, 8, torch.float32)
    grad_y, (x, weight, bias, *adapters) = given.pop("grad_y"), given.values()
    weight.zero_()
    task_ptr = torch.tensor([0, 70, 140])
    wide = [t.double() for t in (x, weight, bias, *adapters)]
    exact = [reference.lora_linear(*wide, task_ptr, 0.7)]
    wide.pop(2)
    exact += reference.lora_linear_backward(grad_y.double(), *wide, task_ptr, 0.7)[3:]
    errors = {}
    for tf32 in (False, True):
        settings = (0.7, 0.0, None, tf32)
        y, shrunk, kept = shim_operators.lora_linear_token(
            x, weight, bias, *adapters, task_ptr, *settings
        )
        found = shim_operators.lora_linear_token_backward(
            *(grad_y, x, weight, *adapters, task_ptr, shrunk, kept, *settings, *[True] * 5, None)
        )
        pairs = zip((y, *found[3:]), exact, strict=True)
        errors[tf32] = [relative_error(got, right) for got, right in pairs]
    assert all(error < 1e-6 for error in errors[False])
    assert all(1e-5 < error < 1e-3 for error in errors[True])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_", [64, 33, 8, 130])
def test_the_kept_bits_are_the_mask_of_the_reference_and_the_cpu(
    shim_operators: Any, dtype: torch.dtype, in_: int
) -> None:
    given = problem((3, 70), in_, 5, 2, dtype)
    arguments = [t for name, t in given.items() if name != "grad_y"]
    rest = (torch.tensor([0, 3, 73]), 1.0, 0.3, torch.tensor(2**40 + 5), True)
    kept = shim_operators.lora_linear_token(*arguments, *rest)[2]
    bits = kept.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    mask = bits.flatten(1).bool()
    assert kept.shape == (73, (in_ + 63) // 64 * 8)
    assert torch.equal(mask[:, :in_], reference.dropout_mask(rest[3], 0.3, 73, in_))
    assert not mask[:, in_:].any()
    if native_available():
        on_cpu = torch.ops.metalora.lora_linear_token(*arguments, *rest)[2]
        assert torch.equal(on_cpu.flatten(1)[:, : in_ // 8], kept[:, : in_ // 8])


def test_what_is_launched_is_one_pass_forward_and_two_backward(
    shim_operators: Any, asked: Callable[[], list[tuple[str, tuple[int, ...]]]]
) -> None:
    given = problem((256, 256), 16, 24, 2, torch.bfloat16)
    grad_y, (x, weight, bias, *adapters) = given.pop("grad_y"), given.values()
    task_ptr, settings = torch.tensor([0, 256, 512]), (1.0, 0.1, torch.tensor(3), False)
    _, shrunk, kept = shim_operators.lora_linear_token(
        x, weight, bias, *adapters, task_ptr, *settings
    )
    assert [name for name, _ in asked()] == ["token_kernel", "addmm"]
    frozen = (True, False, False, True, True)
    shim_operators.lora_linear_token_backward(
        grad_y, x, weight, *adapters, task_ptr, shrunk, kept, *settings, *frozen, None
    )
    passes = ["token_kernel", "addmm", "token_kernel", "sum_token_kernel", "sum_token_kernel"]
    assert [name for name, _ in asked()] == passes


def test_with_dropout_large_ranks_leave_lora_a_to_the_blas(
    shim_operators: Any, asked: Callable[[], list[tuple[str, tuple[int, ...]]]]
) -> None:
    """Addends of many ranks would be more than two passes over x."""
    given = problem((70, 70), 24, 40, 32, torch.float64)
    grad_y, (x, weight, bias, *adapters) = given.pop("grad_y"), given.values()
    task_ptr, settings = torch.tensor([0, 70, 140]), (0.7, 0.3, torch.tensor(3), False)
    _, shrunk, kept = shim_operators.lora_linear_token(
        x, weight, bias, *adapters, task_ptr, *settings
    )
    asked()
    found = shim_operators.lora_linear_token_backward(
        grad_y, x, weight, *adapters, task_ptr, shrunk, kept, *settings, *[True] * 5, None
    )
    names = [name for name, _ in asked()]
    assert names.count("token_kernel") == 1 and names.count("kept_kernel") == 1
    exact = reference.lora_linear_backward(grad_y, x, weight, *adapters, task_ptr, *settings[:3])
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("out", [1, 7, 64, 130])
def test_the_gradient_of_the_bias_is_summed_once_over_every_row(
    shim_operators: Any, dtype: torch.dtype, tf32: bool, out: int
) -> None:
    given = problem((70, 0, 129), 16, out, 3, dtype)
    grad_y, (x, weight, _, *adapters) = given.pop("grad_y"), given.values()
    task_ptr = torch.tensor([0, 70, 70, 199])
    shrunk, kept = x.new_zeros(199, 3), torch.empty(0, dtype=torch.uint8)
    settings = (1.0, 0.0, None, tf32)
    grads = [
        shim_operators.lora_linear_token_backward(
            *(grad_y, x, weight, *adapters, task_ptr, shrunk, kept, *settings),
            *(False, False, True, False, False, None),
        )[2]
        for _ in range(2)
    ]
    assert torch.equal(*grads)
    assert relative_error(grads[0], grad_y.double().sum(0)) < FLOOR[dtype]
