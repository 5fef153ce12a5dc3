"""Counter-based dropout: whether an element is kept depends on the seed and its index alone."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def dropout_mask(seed: Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Which elements of a [rows, columns] matrix dropout keeps.

    Element ``i = row * columns + column`` takes word ``i % 4`` of Philox4x32-10 (Salmon et al.,
    "Parallel Random Numbers: As Easy as 1, 2, 3", 2011) with counter ``i // 4`` and key ``seed``,
    and is kept when that word is at least ``p * 2**32``.

    Args:
        seed: int64 scalar tensor.
        p: probability to drop an element, 0 <= p < 1.
        rows: number of rows.
        columns: number of columns.

    Returns:
        bool [rows, columns] on the device of ``seed``, True where the element is kept.
    """
    blocks = torch.arange((rows * columns + 3) // 4, device=seed.device)
    zeros = torch.zeros_like(blocks)
    words = [blocks & _LOW, blocks >> 32, zeros, zeros]
    key = [seed & _LOW, (seed >> 32) & _LOW]
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], words[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], words[2])
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
        key = [(k + step) & _LOW for k, step in zip(key, _KEY_STEPS, strict=True)]
    kept = torch.stack(words, dim=1).flatten() >= int(p * 2**32)
    return kept[: rows * columns].view(rows, columns)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b, both below 2**32; by 16-bit halves, which fit into int64."""
    by_high, by_low = a * (b >> 16), a * (b & 0xFFFF)
    high = (by_high + (by_low >> 16)) >> 16
    low = (((by_high & 0xFFFF) << 16) + by_low) & _LOW
    return high, low
