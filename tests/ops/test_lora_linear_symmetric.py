"""`lora_linear_symmetric` on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metalora import ops
from tests.ops.problems import relative_error

F64 = torch.float64


def problem(dim: int, *rows: int) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor]:
    shapes = ((sum(rows), dim), (dim, dim), (dim,), (len(rows), dim, 2))
    tensors = tuple(torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes)
    return tensors, torch.tensor([0, *rows]).cumsum(0)  # type: ignore[return-value]


@pytest.mark.parametrize("dim", [5, 70])
@pytest.mark.parametrize("rows", [(4, 0, 9), (200, 200)], ids=str)
@pytest.mark.parametrize("route", ops.ROUTES)
def test_agrees_with_matrices_that_are_formed(dim: int, rows: tuple[int, ...], route: str) -> None:
    tensors, task_ptr = problem(dim, *rows)
    x, weight, bias, lora_U = tensors
    y = ops.lora_linear_symmetric(*tensors, task_ptr, scaling=0.7, route=route)
    formed = weight + 0.7 * lora_U @ lora_U.mT
    wanted = torch.cat([part @ W.T for part, W in zip(x.split(rows), formed, strict=True)]) + bias
    grad = torch.randn_like(y)
    pairs = zip(
        (y, *torch.autograd.grad(y, tensors, grad)),
        (wanted, *torch.autograd.grad(wanted, tensors, grad)),
        strict=True,
    )
    for got, right in pairs:
        assert relative_error(got, right) < 1e-12


@pytest.mark.parametrize("route", ["weight", "token"])
def test_gradcheck_and_gradgradcheck(route: str) -> None:
    tensors, task_ptr = problem(3, 3, 0, 2)

    def layer(*leaves: Tensor) -> Tensor:
        return ops.lora_linear_symmetric(*leaves, task_ptr, scaling=0.5, route=route)

    assert torch.autograd.gradcheck(layer, tensors)
    assert torch.autograd.gradgradcheck(layer, tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_U": torch.randn(2, 4, 2, dtype=F64)}, r"weight must be \[d=4, d=4\]"),
        ({"lora_U": torch.randn(4, 2, dtype=F64)}, r"lora_U must be \[T, d, k\]"),
        ({"scaling": -1.0}, "scaling must be >= 0, got -1.0"),
        ({"task_ptr": torch.tensor([0, 3, 8])}, "task_ptr must start at 0 and end at M=7"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], message: str) -> None:
    tensors, task_ptr = problem(3, 3, 4)
    given = dict(zip(("x", "weight", "bias", "lora_U"), tensors, strict=True))
    with pytest.raises(ValueError, match=f"^lora_linear(_symmetric)?: {message}"):
        ops.lora_linear_symmetric(**{**given, "task_ptr": task_ptr, **change})
