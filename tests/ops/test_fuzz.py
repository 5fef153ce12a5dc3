"""Random shapes, splits, strides and options of `lora_linear` against the oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metalora import ops, reference
from metalora._library import native_available
from tests.ops.problems import Problem, oracle, problem, relative_error

ROUTES = ["token", "weight"] if native_available() else ["reference"]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to 6 tasks of 0 to 150 rows; features around every boundary of the kernels."""
    rows = tuple(draw(st.lists(st.integers(0, 150), min_size=1, max_size=6)))
    features = st.integers(1, 70)
    sizes = (draw(features), draw(features), draw(st.integers(1, 9)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    p = problem(rows, sizes, bias=draw(st.booleans()))
    if draw(st.booleans()):  # rows that are not contiguous
        wide = torch.randn(sum(rows), 2 * sizes[0], dtype=torch.float64)
        wide[:, ::2] = p.x.detach()
        p.x = wide[:, ::2].requires_grad_()
    return p


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(p=problems(), route=st.sampled_from(ROUTES), scaling=st.floats(-4, 4), data=st.data())
def test_lora_linear(p: Problem, route: str, scaling: float, data: st.DataObject) -> None:
    keep, drop_p = None, 0.0
    if route == "token" and data.draw(st.booleans()):
        drop_p = data.draw(st.sampled_from([0.01, 0.3, 0.9]))
        keep = reference.dropout_mask(torch.tensor(7), drop_p, *p.x.shape)
    y = ops.lora_linear(
        *p.tensors, p.task_ptr, scaling=scaling, dropout_p=drop_p, seed=7, route=route
    )
    wanted = oracle(p, scaling, keep, drop_p)
    grad_y = torch.randn_like(wanted)
    got = [y, *torch.autograd.grad(y, p.leaves, grad_y)]
    exact = [wanted, *torch.autograd.grad(wanted, p.leaves, grad_y)]
    for value, truth in zip(got, exact, strict=True):
        # An update that nearly cancels against x Wᵀ may lose digits: judge by absolute size too.
        assert relative_error(value, truth) < 1e-11 or (value - truth).abs().max() < 1e-10
