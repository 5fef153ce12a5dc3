"""Attention within each of several sequences, one behind the other."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import (
    check_count,
    check_float,
    check_like,
    check_positive,
    check_probability,
    check_shape,
)
from metalora.ops._native import autocast, autocasting, call, register, usable
from metalora.ops.dropout import seed_tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ends: Tensor,
    *,
    scale: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """drop(softmax(s · q kᵀ)) v within each of several sequences, for each head.

    Differentiable any number of times. Sums are kept in float32, or in float64 for that, and no
    scores are stored. Native on CPUs alone; elsewhere plain PyTorch, one sequence after the other.
    Under autocast, query, key and value are cast to its dtype.

    Args:
        query: [N, heads, d], the tokens of all sequences, one behind the other.
        key, value: [N, key_heads, d], where heads is a multiple of key_heads: with g times as many,
            head i has the keys and values of head i // g (grouped-query attention).
        ends: int32 [S + 1] on the CPU; tokens ``ends[i]:ends[i + 1]`` are sequence i.
        scale: s; None means 1 / sqrt(d).
        dropout_p: probability in [0, 1) to drop a weight.
        seed: int in [0, 2**63) or int64 scalar tensor that fixes the dropout mask (see
            `metalora.reference.packed_attention`); None draws one from torch's generator. With an
            int64 tensor [S] each sequence has the mask that it would have alone, with its own seed.
        causal: whether a token sees only itself and those before it.
        window: with ``causal``, how many tokens it sees at most, itself among them.
        softcap: c, if scores x become c · tanh(x / c).

    Returns:
        [N, heads, d], in the dtype of ``query``.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    function = "packed_attention"
    check_float(function, "query", query)
    if autocasting(query.device.type):
        query, key, value = autocast(query), autocast(key), autocast(value)
    check_shape(function, "query", query, ("N", "heads", "d"), (None, None, None))
    tokens, heads, d = query.shape
    check_shape(function, "key", key, ("N", "key_heads", "d"), (tokens, None, d))
    key_heads = key.shape[1]
    check_shape(function, "value", value, ("N", "key_heads", "d"), (tokens, key_heads, d))
    if heads % key_heads if key_heads else heads:
        raise ValueError(
            f"{function}: query must have a multiple of the heads of key, got {heads} and "
            f"{key_heads}"
        )
    for name, tensor in (("key", key), ("value", value)):
        check_like(function, name, tensor, "query", query)
    if not isinstance(ends, Tensor) or ends.dtype != torch.int32 or not ends.is_cpu:
        got = f"{ends.dtype} on {ends.device}" if isinstance(ends, Tensor) else type(ends).__name__
        raise TypeError(f"{function}: ends must be an int32 tensor [S+1] on the CPU, got {got}")
    check_shape(function, "ends", ends, ("S+1",), (None,))
    if not torch.compiler.is_compiling():
        bounds = ends.tolist()
        if bounds[:1] != [0] or bounds[-1] != len(query) or bounds != sorted(bounds):
            raise ValueError(
                f"{function}: ends must ascend from 0 to N={len(query)}, got {bounds[:3]} to "
                f"{bounds[-3:]}"
            )
    scale = 1 / math.sqrt(query.shape[2]) if scale is None else float(scale)
    dropout_p = check_probability(function, "dropout_p", dropout_p)
    sequences = ends.shape[0] - 1
    seed = seed_tensor(function, seed, query.device, sequences) if dropout_p > 0 else None
    if window is not None and not causal:
        raise ValueError(f"{function}: window needs causal=True, got window={window} without")
    seen = 0 if not causal else _ALL if window is None else check_count(function, "window", window)
    cap = 0.0 if softcap is None else check_positive(function, "softcap", softcap)
    arguments = (query, key, value, ends, scale, dropout_p, seed, seen, cap)
    if query.is_cpu and usable(query):
        return _PackedAttention.apply(*arguments)
    return reference.packed_attention(*arguments)


_ALL = sys.maxsize  # as a window: all tokens before


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        query, key, value, ends, *settings = arguments
        output, normaliser = call("packed_attention", *arguments)
        ctx.scale, ctx.dropout_p, seed, ctx.window, ctx.softcap = settings
        ctx.save_for_backward(query, key, value, ends, seed, normaliser)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, ends, seed, normaliser = ctx.saved_tensors
        settings = (ctx.scale, ctx.dropout_p, seed, ctx.window, ctx.softcap)
        if torch.is_grad_enabled():  # create_graph=True: gradients that can be differentiated
            rows = [part.view_as(part) for part in (query, key, value)]
            q, k, v = rows
            output = reference.packed_attention(q, k, v, ends, *settings)
            inputs = [row for row, need in zip(rows, ctx.needs_input_grad, strict=False) if need]
            found = iter(torch.autograd.grad(output, inputs, grad, create_graph=True))
            gradients = [next(found) if need else None for need in ctx.needs_input_grad[:3]]
        else:
            arguments = (grad, query, key, value, ends, normaliser, *settings)
            gradients = list(call("packed_attention_backward", *arguments))
        return *gradients, *[None] * 6


@register("packed_attention")
def _fake(a: Any) -> tuple[Tensor, Tensor]:
    dtype = a.query.dtype if a.query.dtype == torch.float64 else torch.float32
    return torch.empty_like(a.query, memory_format=torch.contiguous_format), a.query.new_empty(
        a.query.shape[:2], dtype=dtype
    )


@register("packed_attention_backward")
def _backward_fake(a: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = a.key.shape
    return a.query.new_empty(a.query.shape), a.query.new_empty(shape), a.query.new_empty(shape)
