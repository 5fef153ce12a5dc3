"""Attention within each of several sequences, one behind the other."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from metalora._checks import SHORT
from metalora.reference.dropout import dropout_mask


def packed_attention(
    query: Tensor,  # [N, heads, d]
    key: Tensor,  # [N, key_heads, d], of which heads is a multiple
    value: Tensor,  # [N, key_heads, d]
    ends: Tensor,  # integers [S + 1]: tokens ends[i]:ends[i + 1] are sequence i
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 scalar, or [S]
    window: int = 0,  # a token sees itself and those before it, so many in all; 0: every token
    softcap: float = 0.0,  # 0: no cap
) -> Tensor:  # [N, heads, d]
    """drop(softmax(s · q kᵀ)) v within each sequence, for each head.

    Head i has the keys and values of head i * key_heads // heads. With a cap c, scores x become
    c · tanh(x / c).

    Dropout keeps a weight as `dropout_mask` does the element of row ``token * heads + head`` whose
    column is the key's place in its sequence. Rows have as many columns as the longest sequence
    has tokens, rounded up to a multiple of 4. With seeds [S] a sequence has the mask that it would
    have alone, with its own seed. 16-bit inputs are computed with in float32.
    """
    dtype = query.dtype
    if dtype in SHORT:
        query, key, value = query.float(), key.float(), value.float()
    tokens, heads, _ = query.shape
    group = heads // max(key.shape[1], 1)
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    bounds = ends.tolist()
    kept: list[Tensor] = []  # of each sequence [heads, n, columns]
    if dropout_p > 0:
        assert seed is not None
        sizes = [end - start for start, end in pairwise(bounds)]
        if seed.dim() == 0:
            kept = list(
                _kept(seed, dropout_p, tokens, heads, max(sizes, default=0)).split(sizes, 1)
            )
        else:
            kept = [_kept(one, dropout_p, n, heads, n) for one, n in zip(seed, sizes, strict=True)]
    outputs = [query[:0] + value[:0]]
    for i, (start, end) in enumerate(pairwise(bounds)):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        scores = scale * q @ k.mT  # [heads, n, n]
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if window > 0:
            scores = scores.masked_fill(~seen_keys(end - start, window, scores.device), -torch.inf)
        weights = torch.softmax(scores, -1)
        if kept:
            weights = weights * kept[i][..., : end - start] / (1 - dropout_p)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs).to(dtype)


def _kept(seed: Tensor, p: float, tokens: int, heads: int, longest: int) -> Tensor:
    """bool [heads, tokens, longest rounded up to a multiple of 4]: the weights to keep."""
    columns = -(-longest // 4) * 4
    kept = dropout_mask(seed, p, tokens * heads, columns)
    return kept.view(tokens, heads, columns).transpose(0, 1)


def seen_keys(tokens: int, window: int, device: torch.device) -> Tensor:
    """bool [tokens, tokens]: which keys each query sees, itself and those before it."""
    places = torch.arange(tokens, device=device)
    ages = places[:, None] - places
    return (ages >= 0) & (ages < window)
