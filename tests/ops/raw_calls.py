"""A valid call of every raw operator, to be spoiled one argument at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

F64 = torch.float64


def _lora(*rest: Any) -> tuple[Any, ...]:
    return (
        *(torch.randn(7, 5, dtype=F64), torch.randn(4, 5, dtype=F64), torch.randn(4, dtype=F64)),
        *(torch.randn(2, 3, 5, dtype=F64), torch.randn(2, 4, 3, dtype=F64)),
        *(torch.tensor([0, 3, 7]), 0.5, *rest),
    )


def _lora_backward(*rest: Any) -> tuple[Any, ...]:
    x, weight, _, *others = _lora(*rest)
    return (torch.randn(7, 4, dtype=F64), x, weight, *others, *[True] * 5)


def _symmetric(*first: Tensor) -> tuple[Any, ...]:
    shapes = ((7, 4), (4, 4), (4,), (2, 4, 3))
    x, weight, bias, lora_U = (torch.randn(shape, dtype=F64) for shape in shapes)
    given = (x, weight, lora_U) if first else (x, weight, bias, lora_U)
    return *first, *given, torch.tensor([0, 3, 7]), 0.5, None, False


def _merge() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, 5), torch.randn(2, 3, 5), torch.randn(2, 4, 3)


def _statistics(*batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(*batch, 9, 3)
    return x.mT @ x, x.mT @ x, torch.ones(batch)


def _samples(*batch: int) -> tuple[Tensor, ...]:
    x, y = torch.randn(*batch, 9, 3), torch.randn(*batch, 9)
    return x, y, torch.randn(2, 3, 3), torch.randn(2, 3)


def _seed() -> Tensor:
    return torch.tensor(5)


def _token_backward() -> tuple[Any, ...]:
    grad_y, x, weight, lora_A, lora_B, task_ptr, scaling, *rest = _lora_backward(
        0.3, _seed(), False
    )
    shrunk, kept = torch.randn(7, 3, dtype=F64), torch.zeros(7, 8, dtype=torch.uint8)
    saved = (x, weight, lora_A, lora_B, task_ptr, shrunk, kept)
    return (grad_y, *saved, scaling, *rest, torch.randn_like(x))


def _attention(*rest: Any) -> tuple[Any, ...]:
    rows = [torch.randn(7, 2, 5, dtype=F64) for _ in range(3)]
    return *rows, torch.tensor([0, 3, 3, 7], dtype=torch.int32), *rest, 0.4, 0.3, _seed(), 2, 1.5


_ADAMW = (2, 1e-3, 0.9, 0.999, 1e-8, 0.0)

ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "lora_linear_weight": lambda: _lora(torch.randn(2, 4, 5, dtype=F64), False),
    "lora_linear_weight_backward": lambda: _lora_backward(torch.randn(2, 4, 5, dtype=F64), False),
    "lora_linear_symmetric": lambda: _symmetric(),
    "lora_linear_symmetric_backward": lambda: (
        *_symmetric(torch.randn(7, 4, dtype=F64)),
        *[True] * 4,
    ),
    "lora_linear_token": lambda: _lora(0.3, _seed(), False),
    "lora_linear_token_backward": _token_backward,
    "merge_lora": lambda: (*_merge(), 0.5, None, False),
    "merge_lora_backward": lambda: (torch.randn(2, 4, 5), *_merge()[1:], 0.5, False),
    "merge_lora_symmetric": lambda: (torch.randn(4, 4), torch.randn(2, 4, 3), None, False),
    "merge_lora_symmetric_backward": lambda: (
        *(torch.randn(2, 4, 4), torch.randn(2, 4, 3), False),
    ),
    "task_matvec": lambda: (torch.randn(4, 4), torch.randn(2, 9, 4), torch.randn(2, 4, 3)),
    "task_matvec_backward": lambda: (
        *(torch.randn(2, 9, 4), torch.randn(4, 4), torch.randn(2, 9, 4), torch.randn(2, 4, 3)),
        *[True] * 3,
    ),
    "packed_attention": _attention,
    "packed_attention_backward": lambda: (
        torch.randn(7, 2, 5, dtype=F64),
        *_attention(torch.randn(7, 2, dtype=F64)),
    ),
    "dropout_mask": lambda: (_seed(), 0.3, 4, 5),
    "linear_lora_ml": lambda: (
        *(*_statistics(2, 2), torch.randn(2, 3, 3), torch.randn(2, 2, 3, 1)),
        *(9, 2, 2, 1e-3, 1e-3),
    ),
    "linear_standard": lambda: (*_statistics(2, 2), torch.randn(2, 3, 3), 9, 2, 1e-3),
    "linear_finetune_lora": lambda: (
        *(*_statistics(2), torch.randn(2, 3, 3), torch.randn(2, 3, 1), torch.randn(2, 3, 1)),
        *(torch.randn(2, 3, 3), 9, 2, 1e-3),
    ),
    "shallow_retrain": lambda: (
        *(*_samples(2, 2), torch.randn(2, 2, 1, 3), torch.randn(2, 2, 3, 1)),
        *_ADAMW,
    ),
    "shallow_finetune_lora": lambda: (
        *(*_samples(2), torch.randn(2, 1, 3), torch.randn(2, 3, 1)),
        *_ADAMW,
    ),
}


def tensor_arguments(name: str) -> list[tuple[int, str]]:
    """Position and name of each tensor that the operator takes."""
    schema = getattr(torch.ops.metalora, name).default._schema
    given = ARGUMENTS[name]()
    return [(i, a.name) for i, a in enumerate(schema.arguments) if isinstance(given[i], Tensor)]


def defined_operators(library: str) -> set[str]:
    """The names of csrc/schemas.h as torch's dispatcher has them."""
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix(f"{library}::") for n in names if n.startswith(f"{library}::")}


def has_kernel(library: str, name: str) -> bool:
    """Whether there is a kernel for CPU tensors; the shim's kernels for these are those of CUDA."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", "CPU")
