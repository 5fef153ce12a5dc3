"""The multi-task LoRA layer by metalora and by its baselines: all compute the same.

A version is a function of a `Setup` that returns the layer, a function of x, weight, bias, lora_A
and lora_B. What depends on the split of the rows alone is made beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.lib.cases import NotOfferedError
from benchmarks.lib.tensor_case import SCALING, Setup
from metalora import ops

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def drop(setup: Setup, rows: Tensor, first: int = 0) -> Tensor:
    """Dropout of the rows [n, in] of x that begin at row ``first``."""
    p = setup.case.dropout
    if p == 0:
        return rows
    if setup.seed is None:
        return F.dropout(rows, p)
    seed = torch.tensor(setup.seed, device=rows.device)
    keep = ops.dropout_mask(seed, p, sum(setup.case.rows), rows.shape[1])
    return torch.where(keep[first : first + len(rows)], rows / (1 - p), 0)


class Padding:
    """Puts the rows of ragged tasks [M, n] at equal or aligned places, and takes them back."""

    def __init__(self, setup: Setup, rows: list[int]) -> None:
        starts = torch.tensor([0, *rows]).cumsum(0)[:-1]
        shift = (starts - torch.tensor(setup.case.bounds[:-1])).repeat_interleave(
            torch.tensor(setup.case.rows)
        )
        self.slots = (torch.arange(sum(setup.case.rows)) + shift).to(setup.device)
        self.total = sum(rows)

    def put(self, rows: Tensor) -> Tensor:
        return rows.new_zeros(self.total, rows.shape[1]).index_copy(0, self.slots, rows)

    def take(self, rows: Tensor) -> Tensor:
        return rows.index_select(0, self.slots)


def metalora(setup: Setup, route: str = "auto", keep_merged: bool = False) -> Layer:
    if route == "weight":
        _check_no_dropout(setup)
    task_ptr = setup.case.task_ptr()

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_linear(
            x,
            weight,
            bias,
            lora_A,
            lora_B,
            task_ptr,
            scaling=SCALING,
            dropout_p=setup.case.dropout,
            seed=setup.seed,
            route=route,
            keep_merged=keep_merged,
        )

    return layer


def dense(setup: Setup) -> Layer:
    """The shared layer without any adapter: the floor."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return layer


def loop(setup: Setup) -> Layer:
    """A Python loop over tasks, each with its own dense product and LoRA branch."""
    sizes, starts = list(setup.case.rows), setup.case.bounds[:-1]

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        parts = []
        for rows, start, a, b in zip(x.split(sizes), starts, lora_A, lora_B, strict=True):
            update = F.linear(F.linear(drop(setup, rows, start), a), b)
            parts.append(F.linear(rows, weight, bias) + SCALING * update)
        return torch.cat(parts)

    return layer


def bmm(setup: Setup) -> Layer:
    """One dense product for all rows, batched ones for the adapters; ragged tasks are padded."""
    tasks, longest = setup.case.tasks, max(setup.case.rows)
    padding = None if setup.case.equal else Padding(setup, [longest] * tasks)

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        branch = drop(setup, x)
        if padding is None:
            shrunk = torch.bmm(branch.view(tasks, longest, -1), lora_A.mT)
            y = y.view(tasks, longest, -1)
            return torch.baddbmm(y, shrunk, lora_B.mT, alpha=SCALING).flatten(0, 1)
        shrunk = torch.bmm(padding.put(branch).view(tasks, longest, -1), lora_A.mT)
        update = torch.bmm(shrunk, lora_B.mT).flatten(0, 1)
        return y + SCALING * padding.take(update)

    return layer


def merged(setup: Setup) -> Layer:
    """Every W_t = W + s B_t A_t formed, then a batched product, or one per ragged task."""
    _check_can_merge(setup)
    tasks, sizes = setup.case.tasks, list(setup.case.rows)

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        weights = _merge(weight, lora_A, lora_B).to(x.dtype)
        if setup.case.equal:
            return torch.baddbmm(bias, x.view(tasks, sizes[0], -1), weights.mT).flatten(0, 1)
        parts = zip(x.split(sizes), weights, strict=True)
        return torch.cat([F.linear(rows, w, bias) for rows, w in parts])

    return layer


def merged_grouped(setup: Setup) -> Layer:
    """Every W_t = W + s B_t A_t formed, then one grouped product."""
    _check_can_merge(setup)
    grouped_product = _grouped_product(setup)

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return grouped_product(x, _merge(weight, lora_A, lora_B).to(x.dtype)) + bias.to(x.dtype)

    return layer


def grouped(setup: Setup) -> Layer:
    """One dense product for all rows, grouped ones for the adapters; the rank is padded."""
    grouped_product = _grouped_product(setup)
    more = -setup.case.rank % 8  # 16 bytes in 16-bit dtypes

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        a = F.pad(lora_A, (0, 0, 0, more)).to(x.dtype)
        b = F.pad(lora_B, (0, more)).to(x.dtype)
        update = grouped_product(grouped_product(drop(setup, x), a), b)
        return F.linear(x, weight, bias) + SCALING * update

    return layer


def unsloth(setup: Setup) -> Layer:
    """The order of operations of Unsloth's LoRA kernels, with the gradient of W added."""
    if setup.case.dropout:
        raise NotOfferedError("Unsloth's order of operations has no dropout")

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y: Tensor = _InPlaceLoRA.apply(x, weight, bias, lora_A, lora_B, setup.case)
        return y

    return layer


def peft(setup: Setup) -> Layer:
    """PEFT's own layer, with `set_adapter` before every task's rows."""
    from peft import LoraConfig, get_peft_model

    case = setup.case
    names = [f"task{t}" for t in range(case.tasks)]
    alpha: Any = SCALING * case.rank
    config = LoraConfig(r=case.rank, lora_alpha=alpha, target_modules=["0"])
    base = nn.Linear(case.in_features, case.out_features, device="meta")
    model: Any = get_peft_model(nn.Sequential(base), config, names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    module = model.base_model.model[0]
    for name, start in zip(names, case.bounds[:-1], strict=True):
        module.lora_dropout[name] = _Dropout(setup, start)
    # The measured tensors take the places of the parameters that PEFT made.
    for linear in (module.base_layer, *module.lora_A.values(), *module.lora_B.values()):
        linear._parameters.clear()

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        module.base_layer.weight, module.base_layer.bias = weight, bias
        parts = []
        each = zip(names, x.split(list(case.rows)), lora_A, lora_B, strict=True)
        for name, rows, a, b in each:
            module.lora_A[name].weight, module.lora_A[name].bias = a, None
            module.lora_B[name].weight, module.lora_B[name].bias = b, None
            module.set_adapter(name)
            parts.append(module(rows))
        return torch.cat(parts)

    return layer


class _Dropout(nn.Module):
    def __init__(self, setup: Setup, first: int) -> None:
        super().__init__()
        self.setup, self.first = setup, first

    def forward(self, rows: Tensor) -> Tensor:
        return drop(self.setup, rows, self.first)


class _InPlaceLoRA(torch.autograd.Function):
    """Y = X Wᵀ + b and Y += s (X Aᵀ) Bᵀ in place; saves X alone, and adds to dX in place."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        case: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, lora_A, lora_B)
        ctx.case = case
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        y = F.linear(x, weight.to(x.dtype), bias.to(x.dtype))
        for ours, out, inner in _views(case, y, x):
            out.baddbmm_(torch.bmm(inner, a[ours].mT), b[ours].mT, alpha=SCALING)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        x, weight, lora_A, lora_B = ctx.saved_tensors
        a, b = lora_A.to(x.dtype), lora_B.to(x.dtype)
        grad_x = grad_y @ weight.to(x.dtype)
        grad_A, grad_B = torch.empty_like(a), torch.empty_like(b)
        for ours, out, inner, grad in _views(ctx.case, grad_y, x, grad_x):
            grad_shrunk = torch.bmm(out, b[ours])  # [tasks, rows, r]
            grad_A[ours] = torch.bmm(grad_shrunk.mT, inner).mul_(SCALING)
            grad_B[ours] = torch.bmm(out.mT, torch.bmm(inner, a[ours].mT)).mul_(SCALING)
            grad.baddbmm_(grad_shrunk, a[ours], alpha=SCALING)
        _, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_weight = (grad_y.mT @ x).to(weight.dtype) if need_weight else None
        grad_bias = grad_y.sum(0).to(weight.dtype) if need_bias else None
        return (
            grad_x,
            grad_weight,
            grad_bias,
            grad_A.to(lora_A.dtype),
            grad_B.to(lora_B.dtype),
            None,
        )


def _views(case: Any, *tensors: Tensor) -> list[tuple[Any, ...]]:
    """(tasks, views [tasks, rows, n] of the tensors [M, n]): all tasks where equal, else each."""
    if case.equal:
        return [(slice(None), *(t.view(case.tasks, case.rows[0], -1) for t in tensors))]
    return [
        (slice(t, t + 1), *(tensor[start:end].unsqueeze(0) for tensor in tensors))
        for t, (start, end) in enumerate(pairwise(case.bounds))
    ]


def _check_no_dropout(setup: Setup) -> None:
    if setup.case.dropout:
        raise NotOfferedError("dropout on the LoRA branch has no form in weight space")


def _check_can_merge(setup: Setup) -> None:
    _check_no_dropout(setup)
    if setup.precision.parameters == torch.bfloat16:
        raise NotOfferedError("W + s B A rounded to 16 bits would lose the adapter")


def _merge(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """[T, out, in]; not under autocast, which would round W before B A is added."""
    with torch.autocast(weight.device.type, enabled=False):
        return torch.baddbmm(weight.unsqueeze(0), lora_B, lora_A, alpha=SCALING)


def _grouped_product(setup: Setup) -> Callable[[Tensor, Tensor], Tensor]:
    """x [M, n], weights [T, p, n] -> x_t weights_tᵀ [M, p].

    The gradient's kernel wants at least one row a task, and multiples of 16 bytes.
    """
    rows = [max(8, n + -n % 8) for n in setup.case.rows]
    padding = None if rows == list(setup.case.rows) else Padding(setup, rows)
    ends = torch.tensor(rows, dtype=torch.int32).cumsum(0, dtype=torch.int32).to(setup.device)

    def product(x: Tensor, weights: Tensor) -> Tensor:
        if padding is None:
            return F.grouped_mm(x, weights.mT, offs=ends)
        return padding.take(F.grouped_mm(padding.put(x), weights.mT, offs=ends))

    return product


def _compiled(make: Callable[[Setup], Layer], mode: str, setup: Setup) -> Layer:
    layer: Layer = torch.compile(make(setup), fullgraph=True, dynamic=False, mode=mode)
    return layer


EAGER: dict[str, Callable[[Setup], Layer]] = {
    "dense": dense,
    "metalora": metalora,
    "loop": loop,
    "bmm": bmm,
    "merged": merged,
    "merged-grouped": merged_grouped,
    "grouped": grouped,
    "unsloth": unsloth,
    "peft": peft,
}
ROUTES: dict[str, Callable[[Setup], Layer]] = {
    "metalora-weight": partial(metalora, route="weight"),
    "metalora-keep": partial(metalora, route="weight", keep_merged=True),
    "metalora-token": partial(metalora, route="token"),
}
# Without CUDA graphs of their own: every candidate is captured in the same way.
MODES = {"compile": "default", "max-autotune": "max-autotune-no-cudagraphs"}
COMPILED = {
    f"{name}+{short}": partial(_compiled, EAGER[name], mode)
    for name in ("merged", "bmm", "loop", "dense")
    for short, mode in MODES.items()
}
VERSIONS = EAGER | ROUTES | COMPILED
