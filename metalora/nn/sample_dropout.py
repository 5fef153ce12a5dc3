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
_AT_ONCE = 2**18  # words, for masks of attention are large
_dropout, _attention = F.dropout, F.scaled_dot_product_attention


class SampleDropout:
    """Draws the dropout mask of each sample by itself, from a key and the sample's number.

    An element is kept or not by the key, its sample's number and its place within the sample, as
    the number of its row, head or feature. So a sample has the same mask however far it is padded.
    These numbers are hashed one after the other, with the mixing function of SplitMix64 (Steele,
    Lea and Flood, "Fast Splittable Pseudorandom Number Generators", 2014).

    Args:
        places: int64 [B], the number of each sample.
        lengths: rows of each sample where they are packed, see `metalora.tasks`.
    """

    def __init__(self, places: Tensor, lengths: Sequence[int] | None = None) -> None:
        self._places = {places.device: places}
        self._lengths = None if lengths is None else torch.tensor(lengths, dtype=torch.int64)

    def mask(self, x: Tensor, p: float) -> Tensor:
        """1 / (1 - p) for the elements of x that are kept and 0 for the others, in its dtype."""
        words, shape = self._samples(x)
        for size in shape[:-1]:
            words = _hashed(words[..., None], torch.arange(size, device=x.device))
        columns = torch.arange(shape[-1] if shape else 1, device=x.device)
        mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rows = max(1, _AT_ONCE // max(1, len(columns)))
        parts = zip(
            words.reshape(-1, 1).split(rows),
            mask.view(words.numel(), len(columns)).split(rows),
            strict=True,
        )
        for part, to in parts:
            to.copy_(_hashed(part, columns) >= int(p * 2**64) - 2**63)  # words are signed
        return mask.div_(1 - p)

    def seeds(self, sequences: int, device: torch.device) -> Tensor | None:
        """int64 [sequences] in [0, 2**63); None if samples cannot have equally many.

        One seed per sequence; every sample must have the same number of sequences.
        """
        samples = self._places_on(device)
        if not len(samples) or sequences % len(samples):
            return None
        words = _hashed(_key(device), samples)[:, None]
        words = _hashed(words, torch.arange(sequences // len(samples), device=device))
        return words.flatten() & (2**63 - 1)

    def _samples(self, x: Tensor) -> tuple[Tensor, Sequence[int]]:
        """A word for each sample or packed row, and the shape of what belongs to it."""
        samples, key = self._places_on(x.device), _key(x.device)
        if self._lengths is not None:
            row = 1 if x.dim() > 1 and x.shape[0] == 1 else 0  # the dimension of the rows
            if x.dim() > row and x.shape[row] == self._rows:
                lengths = self._lengths.to(x.device)
                first = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
                of_rows = torch.repeat_interleave(_hashed(key, samples), lengths)
                places = torch.arange(self._rows, device=x.device) - first
                return _hashed(of_rows, places), x.shape[row + 1 :]
        count = len(samples)
        if x.dim() and count and x.shape[0] % count == 0:
            rows = [] if x.shape[0] == count else [x.shape[0] // count]
            return _hashed(key, samples), [*rows, *x.shape[1:]]
        return key, x.shape  # a tensor without samples is all of one

    @property
    def _rows(self) -> int:
        """How many packed rows there are."""
        assert self._lengths is not None
        return int(self._lengths.sum())

    def _places_on(self, device: torch.device) -> Tensor:
        if device not in self._places:
            self._places[device] = next(iter(self._places.values())).to(device)
        return self._places[device]


def _key(device: torch.device) -> Tensor:
    """An int64 scalar from torch's generator on the CPU.

    It takes one number whatever the mask's shape is: activation checkpointing restores the
    generator, and so makes the same mask again.
    """
    return torch.randint(2**63 - 1, ()).to(device)


def _hashed(words: Tensor, numbers: Tensor) -> Tensor:
    """The words of streams that start at ``words``, at the places ``numbers``."""
    words = words + (numbers + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15, signed
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Shifts to the right with zeros, where torch's operator repeats the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@contextmanager
def sample_dropout(places: Tensor, lengths: Sequence[int] | None = None) -> Iterator[None]:
    """Within, dropout draws the mask of each sample by itself, see `SampleDropout`.

    That holds for ``torch.nn.functional.dropout``, and so for nn.Dropout, for the dropout of
    ``scaled_dot_product_attention``, which runs in plain steps then, for that of LoRA branches and
    for attention in packed sequences. A model's inputs must have their samples first. The functions
    of torch are exchanged meanwhile, in all threads, since backward passes of a GPU have threads of
    their own.
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


def sample_seeds(sequences: int, device: torch.device) -> Tensor | None:
    """Inside `sample_dropout` int64 [sequences], a seed for each that follows from its sample.

    Every sample must have as many sequences, one behind the other; None otherwise, and outside.
    """
    return None if _current is None else _current.seeds(sequences, device)


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
    blind = (scores == -math.inf).all(-1, keepdim=True)  # as padding may be; torch gives it zeros
    weights = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return _by_sample(weights, dropout_p) @ value
