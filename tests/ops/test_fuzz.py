"""Random shapes, splits, strides, dtypes and routes of every operator against float64.

The bound on an error is that of rounding: the operator's terms are products, so the same operator
of absolute values says how large the terms are that are summed, element by element.
``FUZZ_CASES`` is the number of cases of each test; with it they are new ones every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from metalora import nn, ops, reference
from metalora._library import native_available
from tests.ops.problems import Problem, oracle

pytestmark = pytest.mark.slow
GIVEN_CASES = os.environ.get("FUZZ_CASES")
fuzz = settings(max_examples=int(GIVEN_CASES or 60), derandomize=GIVEN_CASES is None, deadline=None)
ROUTES = ["auto", "token", "weight"] if native_available() else ["auto", "reference"]
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
FEATURES = st.integers(1, 70)  # around every boundary of the kernels
SEEDS = st.integers(0, 2**63 - 1)
ROWS = st.lists(st.integers(0, 150), min_size=1, max_size=6)


def drawn(draw: st.DrawFn, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draws a tensor with these sizes and with strides that may be any."""
    places = draw(st.permutations(range(len(shape))))
    step = draw(st.sampled_from([1, 1, 2]))
    sizes = [shape[place] for place in places]
    sizes[-1] *= step
    whole = torch.randn(sizes, dtype=torch.float64).to(dtype)
    return whole[..., ::step].permute([places.index(i) for i in range(len(shape))])


def check(
    operator: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    absolute: Callable[..., Tensor] | None = None,
) -> None:
    """Compares an operator and its gradients with an oracle in float64, element by element.

    Args:
        operator: of the leaves.
        exact: the same of leaves in float64.
        leaves: tensors.
        absolute: the same of absolute values; by default ``exact`` of them.
    """
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    y = operator(*leaves)
    grad = torch.randn(y.shape, dtype=torch.float64).to(y.dtype)
    got = [y, *torch.autograd.grad(y, leaves, grad)]

    def in_double(function: Callable[..., Tensor], change: Callable[[Tensor], Tensor]) -> list[Any]:
        own = [change(leaf.detach().double()).requires_grad_() for leaf in leaves]
        value = function(*own)
        return [value, *torch.autograd.grad(value, own, change(grad.double()))]

    wanted = in_double(exact, lambda leaf: leaf)
    sizes = in_double(absolute or exact, torch.abs)
    dtype = leaves[0].dtype
    # Short dtypes round some intermediate results once; all sum in float32, or float64.
    summed = 500 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    bound = summed + (0 if dtype.itemsize > 2 else 8 * torch.finfo(dtype).eps)
    tiny = 4 * torch.finfo(dtype).tiny
    for place, (value, truth, size) in enumerate(zip(got, wanted, sizes, strict=True)):
        assert value.dtype == dtype
        excess = (value.double() - truth).abs() - bound * size.detach() - tiny
        assert not excess.isnan().any() and (excess.numel() == 0 or excess.max() <= 0), place


@st.composite
def problems(draw: st.DrawFn, dtypes: st.SearchStrategy[torch.dtype] = DTYPES) -> Problem:
    """Draws up to 6 tasks of 0 to 150 rows."""
    rows, dtype = tuple(draw(ROWS)), draw(dtypes)
    torch.manual_seed(draw(st.integers(0, 2**31)))
    inputs, outputs, rank = draw(FEATURES), draw(FEATURES), draw(st.integers(1, 9))
    return Problem(
        drawn(draw, dtype, sum(rows), inputs),
        drawn(draw, dtype, outputs, inputs),
        drawn(draw, dtype, outputs) if draw(st.booleans()) else None,
        drawn(draw, dtype, len(rows), rank, inputs),
        drawn(draw, dtype, len(rows), outputs, rank),
        torch.tensor([0, *rows]).cumsum(0),
        rows,
    )


def _with(p: Problem, leaves: Sequence[Tensor]) -> Problem:
    bias = leaves[2] if p.bias is not None else None
    return Problem(leaves[0], leaves[1], bias, leaves[-2], leaves[-1], p.task_ptr, p.rows)


@fuzz
@given(p=problems(), route=st.sampled_from(ROUTES), scaling=st.floats(-4, 4), data=st.data())
def test_lora_linear(p: Problem, route: str, scaling: float, data: st.DataObject) -> None:
    keep, drop_p, seed = None, 0.0, data.draw(SEEDS)
    if route == "token" and data.draw(st.booleans()):
        drop_p = data.draw(st.sampled_from([0.01, 0.3, 0.9]))
        keep = reference.dropout_mask(torch.tensor(seed), drop_p, *p.x.shape)

    def ours(*leaves: Tensor) -> Tensor:
        own = _with(p, leaves)
        options: dict[str, Any] = {"dropout_p": drop_p, "seed": seed, "route": route}
        return ops.lora_linear(*own.tensors, p.task_ptr, scaling=scaling, **options)

    check(
        ours,
        lambda *leaves: oracle(_with(p, leaves), scaling, keep, drop_p),
        p.leaves,
        lambda *leaves: oracle(_with(p, leaves), abs(scaling), keep, drop_p),
    )


@fuzz
@given(p=problems(), route=st.sampled_from(ROUTES), data=st.data())
def test_one_task_is_no_business_of_the_others(p: Problem, route: str, data: st.DataObject) -> None:
    """Whatever a task holds, infinities and NaN too, the others' results keep every bit."""
    task = data.draw(st.integers(0, len(p.rows) - 1))
    poison = data.draw(st.sampled_from([float("nan"), float("inf"), 1e30]))
    own = slice(*p.task_ptr[task : task + 2].tolist())
    grad = torch.randn(len(p.x), len(p.weight), dtype=torch.float64).to(p.x.dtype)

    def results(poisoned: bool) -> list[Tensor]:
        leaves = [leaf.detach().clone() for leaf in (p.x, p.lora_A, p.lora_B)]
        if poisoned:
            leaves[0][own], leaves[1][task], leaves[2][task] = poison, poison, poison
        x, lora_A, lora_B = (leaf.requires_grad_() for leaf in leaves)
        y = ops.lora_linear(x, p.weight, p.bias, lora_A, lora_B, p.task_ptr, route=route)
        found = [y.detach(), *torch.autograd.grad(y, leaves, grad)]
        for place, of in zip((own, own, task, task), found, strict=True):
            of[place] = 0
        return found

    for clean, beside in zip(results(False), results(True), strict=True):
        assert torch.equal(clean, beside)


@fuzz
@given(data=st.data(), dtype=DTYPES, scaling=st.floats(-4, 4))
def test_merge_lora(data: st.DataObject, dtype: torch.dtype, scaling: float) -> None:
    tasks, inputs, outputs, rank = (data.draw(st.integers(1, n)) for n in (6, 150, 150, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = (outputs, inputs), (tasks, rank, inputs), (tasks, outputs, rank)
    leaves = [drawn(data.draw, dtype, *shape) for shape in shapes]

    def exact(s: float) -> Callable[..., Tensor]:
        return lambda w, a, b: w + s * torch.einsum("tor,tri->toi", b, a)

    check(lambda *t: ops.merge_lora(*t, scaling), exact(scaling), leaves, exact(abs(scaling)))


@fuzz
@given(data=st.data(), dtype=DTYPES)
def test_merge_lora_symmetric(data: st.DataObject, dtype: torch.dtype) -> None:
    tasks, size, rank = (data.draw(st.integers(1, n)) for n in (6, 150, 9))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    shapes = (size, size), (tasks, size, rank)
    leaves = [drawn(data.draw, dtype, *shape) for shape in shapes]
    check(ops.merge_lora_symmetric, lambda w, u: w + torch.einsum("tik,tjk->tij", u, u), leaves)


@fuzz
@given(data=st.data(), dtype=DTYPES, symmetric=st.booleans())
def test_task_matvec(data: st.DataObject, dtype: torch.dtype, symmetric: bool) -> None:
    tasks, samples = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 110))
    inputs, outputs = data.draw(st.integers(1, 80)), data.draw(st.integers(1, 80))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    if symmetric:
        rank = data.draw(st.integers(1, 5))
        shapes = [(inputs, inputs), (tasks, samples, inputs), (tasks, inputs, rank)]
        leaves = [drawn(data.draw, dtype, *shape) for shape in shapes]

        def exact(w: Tensor, x: Tensor, u: Tensor) -> Tensor:
            full = w + torch.einsum("tik,tjk->tij", u, u)
            return torch.einsum("tij,tnj->tni", full, x)

        check(ops.task_matvec, exact, leaves)
    else:
        shapes = [(tasks, outputs, inputs), (tasks, samples, inputs)]
        leaves = [drawn(data.draw, dtype, *shape) for shape in shapes]
        check(ops.task_matvec, lambda w, x: torch.einsum("toi,tni->tno", w, x), leaves)


@fuzz
@given(
    seed=SEEDS,
    p=st.floats(0, 1, exclude_max=True, width=32),
    rows=st.integers(0, 300),
    columns=st.integers(0, 300),
)
def test_dropout_mask(seed: int, p: float, rows: int, columns: int) -> None:
    mask = ops.dropout_mask(seed, p, rows, columns)
    assert torch.equal(mask, reference.dropout_mask(torch.tensor(seed), p, rows, columns))


@fuzz
@given(data=st.data(), bias=st.booleans(), sort=st.booleans())
def test_a_layer_computes_each_sample_with_its_own_task(
    data: st.DataObject, bias: bool, sort: bool
) -> None:
    tasks, tokens = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9))
    ids = data.draw(st.lists(st.integers(0, tasks - 1), max_size=40))
    inputs, outputs = data.draw(FEATURES), data.draw(FEATURES)
    rank = data.draw(st.integers(1, min(inputs, outputs, 6)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    layer = nn.MultiTaskLoRALinear(inputs, outputs, tasks, rank=rank, bias=bias).double()
    torch.nn.init.normal_(layer.lora_B)
    task_ids = torch.tensor(sorted(ids) if sort else ids, dtype=torch.int64)
    x = torch.randn(len(ids), tokens, inputs, dtype=torch.float64)

    def exact(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        own = weight + layer.scaling * lora_B[task_ids] @ lora_A[task_ids]
        return torch.einsum("soi,sni->sno", own, x)

    with nn.tasks(task_ids):
        y = layer(x)
        wanted = exact(x, layer.weight, layer.lora_A, layer.lora_B)
        wanted = wanted if layer.bias is None else wanted + layer.bias
        leaves = [layer.weight, layer.lora_A, layer.lora_B]
        grad = torch.randn_like(y)
        got = [y, *torch.autograd.grad(y, leaves, grad)]
        truth = [wanted, *torch.autograd.grad(wanted, leaves, grad)]
    for value, of in zip(got, truth, strict=True):
        assert (value - of).abs().max().item() < 1e-9 if value.numel() else True


@fuzz
@given(data=st.data(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_packed_attention(data: st.DataObject, dtype: torch.dtype) -> None:
    draw = data.draw
    lengths = draw(st.lists(st.integers(0, 40), min_size=1, max_size=5))
    key_heads, size = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    heads = key_heads * draw(st.integers(1, 3))
    causal = draw(st.booleans())
    window = draw(st.none() | st.integers(1, 45)) if causal else None
    softcap = draw(st.none() | st.floats(0.5, 30))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    shapes = [(sum(lengths), n, size) for n in (heads, key_heads, key_heads)]
    leaves = [drawn(draw, dtype, *shape).requires_grad_() for shape in shapes]

    def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention with a mask of all tokens, head by head."""
        key, value = (t.repeat_interleave(heads // key_heads, 1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / size**0.5
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        back = torch.arange(len(query))[:, None] - torch.arange(len(query))
        seen = sequence[:, None] == sequence
        if causal:
            seen &= (back >= 0) & (back < (window or len(query) + 1))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, value)

    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    y = ops.packed_attention(*leaves, ends, causal=causal, window=window, softcap=softcap)
    in_double = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wanted = exact(*in_double)
    grad = torch.randn_like(y)
    got = [y, *torch.autograd.grad(y, leaves, grad)]
    truth = [wanted, *torch.autograd.grad(wanted, in_double, grad.double())]
    limit = 1e-11 if dtype == torch.float64 else 1e-4
    for value, of in zip(got, truth, strict=True):
        assert value.dtype == dtype
        assert value.numel() == 0 or (value.double() - of).abs().max() <= limit * (
            1 + of.abs().max()
        )
