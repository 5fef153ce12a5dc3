"""Where the CUDA operators run in tests: on a GPU, or through the shim on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cost_model import Layer
from metalora.ops import _native


def shim_table(shim: Any) -> dict[str, Any]:
    """By name, what `metalora.ops` calls when its CPU tensors are to take the CUDA code."""
    for name in _native.operators:
        entry = torch._library.simple_registry.singleton.find(f"metalora::{name}")
        other = torch._library.simple_registry.singleton.find(f"metalora_shim::{name}")
        if other.fake_impl.kernel is None:
            torch.library.register_fake(f"metalora_shim::{name}", entry.fake_impl.kernel.func)
    return {name: getattr(shim, name).default for name in _native.operators}


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, dense, at an address that is no multiple of 16."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return memory.copy_(tensor.flatten()).view(tensor.shape)


class Calls:
    """Replaces the operators by ones that note their names, to show what really runs."""

    def __init__(self, monkeypatch: Any) -> None:
        self.names: list[str] = []
        for name, operator in _native._raw.items():
            monkeypatch.setitem(_native._raw, name, self._noting(name, operator))

    def _noting(self, name: str, operator: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.names.append(name)
            return operator(*arguments)

        return call


def calls_of_layer(operators: Any, layer: Layer, route: str, step: str) -> None:
    """Runs one step of a layer by the raw operators of a route, on random numbers."""
    tasks, outer, inner = layer.tasks, layer.out_features, layer.in_features
    kinds = {8: torch.float64, 4: torch.float32, 2: torch.bfloat16}
    given, own = (
        kinds[layer.activation],
        kinds[layer.parameter if route == "weight" else layer.activation],
    )
    x, grad = (torch.randn(layer.total, size, dtype=given) for size in (inner, outer))
    weight = torch.randn(outer, inner, dtype=own)
    lora_A, lora_B = (
        torch.randn(tasks, *s, dtype=own) for s in ((layer.rank, inner), (outer, layer.rank))
    )
    bias = torch.randn(outer, dtype=given) if layer.bias else None
    task_ptr = torch.tensor([0, *layer.rows]).cumsum(0)
    needed = (layer.need_x, layer.need_weight, layer.need_weight and layer.bias, True, True)
    adapters = (lora_A, lora_B, task_ptr)
    if route == "weight":
        merged = weight.expand(tasks, -1, -1).to(given) if layer.keep_merged else None
        rest = (0.7, None if merged is None else merged.contiguous(), layer.tf32)
        if step == "forward":
            if layer.keep_merged:
                operators.merge_lora(weight, lora_A, lora_B, 0.7, given, layer.tf32)
            operators.lora_linear_weight(x, weight, bias, *adapters, *rest)
        else:
            operators.lora_linear_weight_backward(grad, x, weight, *adapters, *rest, *needed)
        return
    dropout = (0.7, layer.dropout, torch.tensor(3) if layer.dropout else None, layer.tf32)
    if step == "forward":
        operators.lora_linear_token(x, weight, bias, *adapters, *dropout)
    else:
        shrunk = torch.randn(layer.total, layer.rank, dtype=given)
        bits = (layer.total, (inner + 63) // 64 * 8) if layer.dropout else (0,)
        kept = torch.randint(256, bits, dtype=torch.uint8)
        name = operators.lora_linear_token_backward
        given_x = torch.randn_like(x) if layer.adds_to_x else None
        name(grad, x, weight, *adapters, shrunk, kept, *dropout, *needed, given_x)
