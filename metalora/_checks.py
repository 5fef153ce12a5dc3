"""Checks of arguments, shared by every layer: one line that says what was expected and passed."""

from __future__ import annotations

import difflib
import math
import operator
import reprlib
import sys
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SHORT = (torch.bfloat16, torch.float16)
PRECISE = (torch.float32, torch.float64)
_LARGEST = sys.float_info.max


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Returns ``"; did you mean 'x' or 'y'?"`` with the names nearest to ``name``, or ``""``."""
    by_lower = {known.lower(): known for known in names}
    found = difflib.get_close_matches(name.lower(), list(by_lower), n=3, cutoff=0.5)
    near = [by_lower[lower] for lower in found]
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where there is none.

    It has at most 500 characters.
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]


def first_of(texts: Sequence[str], most: int) -> str:
    """The texts in a row, or as many of them as a message should have and how many more."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def dtype_and_shape(tensor: Tensor) -> str:
    """What a message says of a tensor, such as ``float32 [3, 4]``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def short(value: Any) -> str:
    """``repr`` on one line, however long or deep the value is."""
    return _REPR.repr(value)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


# Numbers and choices. Each check returns the value that it accepts.


def check_positive(function: str, argument: str, value: Any) -> float:
    """A finite number above zero, returned as a float.

    Raises:
        TypeError, ValueError: if it is not.
    """
    number = _finite_number(function, argument, value, "a finite number > 0")
    if not number > 0:
        raise ValueError(f"{function}: {argument} must be a finite number > 0, got {value!r}")
    return number


def check_nonnegative(function: str, argument: str, value: Any) -> float:
    """A finite number of zero or more, returned as a float.

    Raises:
        TypeError, ValueError: if it is not.
    """
    number = _finite_number(function, argument, value, "a finite number >= 0")
    if number < 0:
        raise ValueError(f"{function}: {argument} must be a finite number >= 0, got {value!r}")
    return number


def check_count(
    function: str, argument: str, value: Any, minimum: int = 1, maximum: int | None = None
) -> int:
    """An int >= ``minimum`` and, unless None, <= ``maximum``, returned as an int.

    NumPy's integers and tensors of one count as ints.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if type(value) is not int:
        try:
            number = None if _is_bool(value) else operator.index(value)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(
                f"{function}: {argument} must be an int >= {minimum}, got {type(value).__name__} "
                f"{value!r}"
            )
        value = number
    if value < minimum:
        raise ValueError(f"{function}: {argument} must be an int >= {minimum}, got {value}")
    if maximum is not None and value > maximum:
        raise ValueError(f"{function}: {argument} must be an int <= {maximum}, got {value}")
    return value


def check_choice(function: str, argument: str, value: Any, choices: Iterable[str]) -> str:
    """One of ``choices``; the ValueError for any other value names the nearest."""
    choices = list(choices)
    if value not in choices:
        hint = did_you_mean(str(value), choices)
        raise ValueError(f"{function}: {argument} must be one of {choices}, got {value!r}{hint}")
    return str(value)


def check_probability(function: str, argument: str, p: float) -> float:
    """A number p with 0 <= p < 1, returned as a float.

    Raises:
        TypeError, ValueError: if it is not.
    """
    if isinstance(p, bool) or not isinstance(p, Real):
        raise TypeError(f"{function}: {argument} must be a number in [0, 1), got {p!r}")
    if not 0 <= p < 1:
        raise ValueError(f"{function}: {argument} must be in [0, 1), got {p!r}")
    return float(p)


def check_matrix_rank(
    function: str, rank: Any, dim: int, *, argument: str = "rank", name: str = "d", minimum: int = 1
) -> int:
    """A rank that a [dim, dim] matrix can have; ``name`` is what ``dim`` is called."""
    check_count(function, argument, rank, minimum)
    if rank > dim:
        raise ValueError(f"{function}: {argument} must be at most {name} = {dim}, got {rank}")
    return int(rank)


def check_scaling(function: str, scaling: Any) -> float:
    """A finite number, returned as a float."""
    if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
        raise TypeError(f"{function}: scaling must be a number, got {type(scaling).__name__}")
    if not -_LARGEST <= scaling <= _LARGEST:  # math.isfinite breaks a graph under torch.compile
        raise ValueError(f"{function}: scaling must be finite, got {scaling}")
    return float(scaling)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool) or getattr(value, "dtype", None) is torch.bool


def _finite_number(function: str, argument: str, value: Any, wanted: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{function}: {argument} must be {wanted}, got {type(value).__name__} {value!r}"
        )
    try:
        number = float(value)
    except OverflowError:  # an int beyond what a float can hold
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{function}: {argument} must be {wanted}, got {value!r}")
    return number


# Tensors, what they are drawn from, and modules.


def check_module(function: str, model: Any) -> nn.Module:
    """An nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be an nn.Module, got {type(model).__name__}")
    return model


def check_tensor(function: str, argument: str, value: Any) -> Tensor:
    """A tensor of any kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}: {argument} must be a tensor, got {type(value).__name__}")
    return value


def check_float(function: str, argument: str, value: Any) -> Tensor:
    """A dense floating-point tensor."""
    check_tensor(function, argument, value)
    if value.dtype not in FLOATS:
        raise TypeError(
            f"{function}: {argument} must be floating point (float32, float64, bfloat16 or "
            f"float16), got {value.dtype}; convert it with .float()"
        )
    if value.layout != torch.strided:
        raise TypeError(
            f"{function}: {argument} must be a dense tensor, got layout {value.layout}; convert "
            "it with .to_dense()"
        )
    return value


def check_constant(
    function: str, argument: str, value: Any, like: str = "", other: Tensor | None = None
) -> Tensor:
    """A float32 or float64 tensor that does not require grad.

    With ``other``, also checked by `check_like`.
    For the linear model and the shallow network, whose functions are not differentiable.
    """
    check_tensor(function, argument, value)
    if value.dtype not in PRECISE:
        raise TypeError(
            f"{function}: {argument} must be float32 or float64, got {value.dtype}; "
            "convert it with .double()"
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{function}: {argument} requires grad, but nothing here is differentiable; "
            "pass it with .detach()"
        )
    if other is not None:
        check_like(function, argument, value, like, other)
    return value


def check_values(
    function: str, argument: str, value: Any, like: str, other: Tensor, shape: Sequence[int]
) -> Tensor:
    """What `check_constant` accepts, of the given shape and without NaN and infinity."""
    check_constant(function, argument, value, like, other)
    check_shape(function, argument, value, shape)
    return check_finite(function, argument, value)


def check_like(
    function: str, argument: str, value: Any, like: str, other: Tensor, dtype: bool = True
) -> Tensor:
    """A floating-point tensor on the device and, by default, of the dtype of another argument."""
    check_float(function, argument, value)
    if value.device != other.device:
        raise ValueError(
            f"{function}: {argument} must be on the device of {like}, {other.device}, got "
            f"{value.device}; move it with .to({str(other.device)!r})"
        )
    if dtype and value.dtype != other.dtype:
        raise TypeError(
            f"{function}: {argument} must have the dtype of {like}, {other.dtype}, got "
            f"{value.dtype}; convert one of them with .to()"
        )
    return value


def check_shape(
    function: str,
    argument: str,
    value: Any,
    shape: Sequence[str | int],
    sizes: Sequence[int | None] | None = None,
) -> Tensor:
    """A tensor of the given sizes.

    Args:
        shape: what each dimension is called; without ``sizes`` the sizes themselves.
        sizes: how large each must be; None for any size.
    """
    check_tensor(function, argument, value)
    wanted: Any = shape if sizes is None else sizes
    got = tuple(value.shape)
    if _agree(wanted, got):
        return value
    parts = [
        str(name) if size is None or str(name) == str(size) else f"{name}={size}"
        for name, size in zip(shape, wanted, strict=True)
    ]
    swapped = len(got) >= 2 and _agree(wanted, (*got[:-2], got[-1], got[-2]))
    hint = "; is it transposed?" if swapped else ""
    raise ValueError(f"{function}: {argument} must be [{', '.join(parts)}], got {list(got)}{hint}")


def check_square(function: str, argument: str, value: Tensor) -> Tensor:
    """A tensor [..., d, d]."""
    if value.dim() < 2 or value.shape[-1] != value.shape[-2]:
        raise ValueError(f"{function}: {argument} must be [..., d, d], got {list(value.shape)}")
    return value


def check_rank(function: str, argument: str, value: Tensor, rank: int) -> None:
    """Raises ValueError if the rank, one of the sizes of ``value``, is zero."""
    if rank == 0:
        raise ValueError(
            f"{function}: {argument} must have a rank of at least 1, got {list(value.shape)}"
        )


def check_finite(function: str, argument: str, value: Tensor) -> Tensor:
    """A tensor without NaN and infinity."""
    if not bool(value.isfinite().all()):
        raise ValueError(f"{function}: {argument} must be finite, got NaN or infinite entries")
    return value


def check_generator(function: str, generator: Any) -> None:
    """Raises TypeError unless ``generator`` is None or a torch.Generator."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"{function}: generator must be a torch.Generator or None, "
            f"got {type(generator).__name__}"
        )


def check_drawing(
    function: str, batch_shape: Sequence[int], generator: Any, dtype: Any
) -> tuple[int, ...]:
    """Checks what every function that draws tensors takes; returns the batch shape."""
    check_generator(function, generator)
    if dtype not in PRECISE:
        raise TypeError(f"{function}: dtype must be torch.float32 or torch.float64, got {dtype}")
    return tuple(check_count(function, "each of batch_shape", size) for size in batch_shape)


def _agree(wanted: Sequence[int | None], got: Sequence[int]) -> bool:
    return len(wanted) == len(got) and all(w in (None, g) for w, g in zip(wanted, got, strict=True))
