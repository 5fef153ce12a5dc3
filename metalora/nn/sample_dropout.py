"""Dropout whose masks depend on the sample, and not on the batch or the process that it is in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_current: SampleDropout | None = None
_dropout, _attention = F.dropout, F.scaled_dot_product_attention


class SampleDropout:
    """Draws the dropout mask of each sample by itself, from a key and the sample's number.

    Args:
        places: int64 [B], the number of each sample.
        lengths: rows of each sample where they are packed, see `metalora.tasks`.
    """

    def __init__(self, places: Tensor, lengths: Sequence[int] | None = None) -> None:
        self._places, self._lengths = places, lengths
        self._numbers: list[int] | None = None
        self._generators: dict[torch.device, torch.Generator] = {}

    def mask(self, x: Tensor, p: float) -> Tensor:
        """1 / (1 - p) for the elements of x that are kept and 0 for the others, in its dtype.

        The key comes from torch's generator on the CPU, which takes one number whatever the shape
        is: activation checkpointing restores it, and so makes the same mask again.
        """
        if self._numbers is None:
            self._numbers = self._places.tolist()
        key = int(torch.randint(2**63 - 1, ()))
        if x.device not in self._generators:
            self._generators[x.device] = torch.Generator(x.device)
        generator = self._generators[x.device]
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for number, part in self._parts(mask):
            generator.manual_seed((key + 0x9E3779B97F4A7C15 * (number + 1)) % 2**63)
            part.bernoulli_(1 - p, generator=generator)
        return mask.div_(1 - p)

    def _parts(self, mask: Tensor) -> Iterator[tuple[int, Tensor]]:
        """What belongs to each sample; a tensor without samples is all of one."""
        assert self._numbers is not None
        count = len(self._numbers)
        if self._lengths is not None:
            rows = mask.squeeze(0) if mask.dim() > 1 else mask
            if len(rows) == sum(self._lengths):
                yield from zip(self._numbers, rows.split(list(self._lengths)), strict=True)
                return
        if mask.dim() and count and len(mask) % count == 0:
            yield from zip(self._numbers, mask.view(count, -1), strict=True)
        else:
            yield -1, mask


@contextmanager
def sample_dropout(places: Tensor, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Within, dropout draws the mask of each sample by itself, see `SampleDropout`.

    That holds for ``torch.nn.functional.dropout``, and so for nn.Dropout, for the dropout of
    ``scaled_dot_product_attention``, which runs in plain steps then, and for that of LoRA branches.
    A model's inputs must have their samples first. The functions of torch are exchanged meanwhile,
    in all threads, since backward passes of a GPU have threads of their own.
    """
    global _current
    before, _current = _current, SampleDropout(places, lengths)
    F.dropout, F.scaled_dot_product_attention = _by_sample, _attend_by_sample
    try:
        yield
    finally:
        _current = before
        if before is None:
            F.dropout, F.scaled_dot_product_attention = _dropout, _attention


def drops_by_sample() -> bool:
    """Whether the caller is inside `sample_dropout`."""
    return _current is not None


def _by_sample(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if _current is None or not training or not 0 < p < 1:
        return _dropout(input, p, training, inplace)
    mask = _current.mask(input, p)
    return input.mul_(mask) if inplace else input * mask


def _attend_by_sample(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p == 0:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = query @ key.transpose(-2, -1) * (scale or 1 / math.sqrt(query.shape[-1]))
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -math.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return _by_sample(scores.softmax(-1), dropout_p) @ value
