"""What one would write without metalora: each takes and returns what `lora_linear` does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.registry import Case
from metalora import ops

Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def metalora_layer(case: Case, route: str = "auto") -> Layer:
    task_ptr = case.task_ptr()

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, bias, lora_A, lora_B, task_ptr, scaling=0.5, route=route)

    return layer


def loop_layer(case: Case) -> Layer:
    """A Python loop over tasks, each with its own dense product and LoRA branch."""
    bounds = case.task_ptr().tolist()

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        parts = []
        for t, (start, end) in enumerate(pairwise(bounds)):
            rows = x[start:end]
            update = F.linear(F.linear(rows, lora_A[t]), lora_B[t])
            parts.append(F.linear(rows, weight, bias) + 0.5 * update)
        return torch.cat(parts)

    return layer


def bmm_layer(case: Case) -> Layer:
    """One dense product for all rows, batched ones for the adapters; ragged tasks are padded."""
    tasks, most = case.tasks, max(case.rows)
    task = torch.repeat_interleave(torch.arange(tasks), torch.tensor(case.rows))
    slot = torch.cat([torch.arange(n) for n in case.rows]) + task * most

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        if case.equal:
            batched = x.view(tasks, most, -1)
        else:
            batched = x.new_zeros(tasks * most, x.shape[1]).index_copy(0, slot, x)
            batched = batched.view(tasks, most, -1)
        shrunk = torch.bmm(batched, lora_A.transpose(1, 2))
        update = torch.bmm(shrunk, lora_B.transpose(1, 2)).flatten(0, 1)
        return y + 0.5 * (update if case.equal else update[slot])

    return layer


def dense_layer(case: Case) -> Layer:
    """The shared layer without any adapter: the floor."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return F.linear(x, weight, bias)

    return layer


LAYERS: dict[str, Callable[[Case], Layer]] = {
    "metalora": metalora_layer,
    "loop": loop_layer,
    "bmm": bmm_layer,
    "dense": dense_layer,
}


def forward_backward(layer: Layer, tensors: list[Tensor]) -> list[Tensor]:
    """y and the gradients of all five inputs (the dense floor has none for the adapters)."""
    *inputs, grad_y = tensors
    y = layer(*inputs)
    gradients = torch.autograd.grad(y, inputs, grad_y, allow_unused=True)
    return [y, *(g for g in gradients if g is not None)]


def check(case: Case, name: str) -> None:
    """The correctness gate: y and gradients in float32 against metalora's reference in float64."""
    if name == "dense":
        return
    exact = forward_backward(metalora_layer(case, route="reference"), case.tensors(torch.float64))
    tensors = [
        t.detach().float().requires_grad_(t.requires_grad) for t in case.tensors(torch.float64)
    ]
    for got, wanted in zip(forward_backward(LAYERS[name](case), tensors), exact, strict=True):
        error = (got.double() - wanted).norm() / wanted.norm()
        if not error < 1e-5:
            raise AssertionError(f"{name} is wrong on {case.name}: relative error {error:.1e}")
