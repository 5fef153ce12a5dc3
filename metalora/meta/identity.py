"""What tells one training from another, as JSON can hold it: numbers, names and digests."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

SAMPLE_BYTES = 2**24
"""How many bytes of a data tensor are read for its digest."""


def identity_of(part: Any) -> Any:
    """What ``part.identity()`` returns, with its class; without that method, its name alone.

    A loader's ``identity()`` returns whatever determines its batches, as JSON can hold it.
    """
    if callable(identity := getattr(part, "identity", None)):
        return {"kind": qualified_name(type(part)), **identity()}
    return qualified_name(part)


def qualified_name(part: Any) -> str | None:
    """Module and name of a function or class, of a partial its function's, else of the class.

    Two functions made in one place, such as two lambdas of one line, have the same name.
    """
    if part is None:
        return None
    while isinstance(part, functools.partial):
        part = part.func
    named = part if hasattr(part, "__qualname__") else type(part)
    # The main module is called otherwise in a process that multiprocessing has spawned.
    return f"{named.__module__}.{named.__qualname__}".replace("__mp_main__.", "__main__.", 1)


def digest_of_data(data: Tensor | Mapping[str, Tensor]) -> str:
    """A digest of tensors [N, ...] that read little: of at most `SAMPLE_BYTES` of each.

    Of a larger one these are whole samples at equal distances, the first and the last among them.
    Equal numbers have equal digests on every device.
    """
    named = dict(data) if isinstance(data, Mapping) else {"": data}
    digest = digest_of_tensors({name: _sample(value) for name, value in named.items()})
    return f"{digest[:16]} of {', '.join(str(list(value.shape)) for value in named.values())}"


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of names, dtypes, shapes and every byte; equal on every device."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        values = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(values.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sample(values: Tensor) -> Tensor:
    size = values.numel() * values.element_size()
    if size <= SAMPLE_BYTES:
        return values
    count = max(2, SAMPLE_BYTES * len(values) // size)
    chosen = torch.arange(count, device=values.device) * (len(values) - 1) // (count - 1)
    return values[chosen]
