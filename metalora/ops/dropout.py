"""The dropout of LoRA branches: a mask that is a pure function of a seed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metalora import reference
from metalora._checks import check_count, check_probability
from metalora.ops._native import raw, register, usable


def dropout_mask(seed: int | Tensor, p: float, rows: int, columns: int) -> Tensor:
    """Which elements of x [rows, columns] `lora_linear` keeps under ``dropout_p=p`` and this seed.

    The mask depends on the seed and the element's index alone (Philox4x32-10), so it is the same
    on every route and device.

    Args:
        seed: int in [0, 2**63), or an int64 scalar tensor whose device decides where the mask is.
        p: probability to drop an element, 0 <= p < 1.
        rows, columns: shape of the mask.

    Returns:
        bool [rows, columns], True where the element is kept.

    Raises:
        TypeError, ValueError: for a seed, p or shape outside these bounds.
    """
    check_count("dropout_mask", "rows", rows, 0)
    check_count("dropout_mask", "columns", columns, 0)
    p = check_probability("dropout_mask", "p", p)
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    seed = seed_tensor("dropout_mask", seed, device)
    if usable(seed):
        return raw("dropout_mask")(seed, p, rows, columns)
    return reference.dropout_mask(seed, p, rows, columns)


def seed_tensor(
    function: str, seed: int | Tensor | None, device: torch.device, sequences: int | None = None
) -> Tensor:
    """The seed as an int64 scalar tensor; None draws one from torch's generator of the device.

    Args:
        function: that was called.
        seed: what it was given.
        device: where the seed must be.
        sequences: S, if there may also be an int64 tensor [S] of seeds.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (), device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) not in ((), (sequences,)):
            many = "" if sequences is None else f" or one of [S={sequences}]"
            raise TypeError(
                f"{function}: seed must be an int or an int64 scalar tensor{many}, got "
                f"{seed.dtype} of shape {list(seed.shape)}"
            )
        if seed.device != device:
            raise ValueError(
                f"{function}: seed must be on {device}, got {seed.device}; move it with "
                f".to({str(device)!r})"
            )
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"{function}: seed must be an int or an int64 scalar tensor, got {type(seed).__name__}"
        )
    if not 0 <= seed < 2**63:
        raise ValueError(f"{function}: seed must be in [0, 2**63), got {seed}")
    return torch.tensor(seed, device=device)


@register("dropout_mask")
def _fake(a: Any) -> Tensor:
    return a.seed.new_empty((a.rows, a.columns), dtype=torch.bool)
