"""What tells one training from another, in values that JSON can hold."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import short

SAMPLE_BYTES = 2**24
"""How many bytes of a data tensor are read for its digest."""

ABSENT = "absent"


def identity_of(part: Any) -> Any:
    """Describes ``part`` for comparison: its class and ``part.identity()``.

    If it has no such method: the name of a function or class, the arguments of a
    ``functools.partial``, or the fields of a frozen dataclass. A loader's ``identity()`` returns
    whatever determines its batches, in values that JSON can hold.
    """
    if callable(identity := getattr(part, "identity", None)):
        return {"kind": qualified_name(type(part)), **identity()}
    if isinstance(part, functools.partial):
        arguments = {**{str(i): v for i, v in enumerate(part.args)}, **part.keywords}
        return {"function": identity_of(part.func), **_values(arguments)}
    if is_dataclass(part) and not isinstance(part, type) and type(part).__hash__ is not None:
        return {
            "kind": qualified_name(type(part)),
            **_values({f.name: getattr(part, f.name) for f in fields(part) if f.compare}),
        }
    return qualified_name(part)


def _values(named: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _value(value) for name, value in named.items()}


def _value(value: Any) -> Any:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return repr(value)  # JSON knows no infinity, and NaN would differ from itself
    if isinstance(value, Tensor):
        return digest_of_data(value)
    if isinstance(value, Mapping):
        return {str(name): _value(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_value(one) for one in value]
    return identity_of(value)


def qualified_name(part: Any) -> str | None:
    """Module and name of a function or class; of a partial those of its function.

    For any other object they are those of its class.

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
    """A digest of tensors [N, ...] that reads at most `SAMPLE_BYTES` of each.

    Of a larger tensor it reads whole samples at equal distances, the first and the last among them.
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


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype and shape of each tensor."""
    return {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors.items()}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model's ``state_dict``."""
    return {n: value for n, value in model.state_dict().items() if isinstance(value, Tensor)}


def extra_state_of(model: nn.Module) -> dict[str, Any]:
    """What ``state_dict`` holds beside tensors: what ``get_extra_state`` of modules returned."""
    return {n: value for n, value in model.state_dict().items() if not isinstance(value, Tensor)}


def _sample(values: Tensor) -> Tensor:
    size = values.numel() * values.element_size()
    if size <= SAMPLE_BYTES:
        return values
    count = max(2, SAMPLE_BYTES * len(values) // size)
    chosen = torch.arange(count, device=values.device) * (len(values) - 1) // (count - 1)
    return values[chosen]


def differences(name: str, saved: Any, wanted: Any, here: str = "here") -> Iterator[str]:
    """``name saved, here wanted`` for each value that differs, however deeply nested."""
    if isinstance(saved, dict) and isinstance(wanted, dict):
        for key in {**wanted, **saved}:
            own = short(key)[1:-1]  # a file's keys may be anything
            inner = f"{name}.{own}" if name else own
            yield from differences(inner, saved.get(key, ABSENT), wanted.get(key, ABSENT), here)
    elif saved != wanted:
        yield f"{name} {short(saved)}, {here} {short(wanted)}".lstrip()
