"""Where the CUDA operators run in tests: on a GPU, or through the shim on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from metalora.ops import _native

OPERATORS = (
    "dropout_mask",
    "linear_finetune_lora",
    "linear_retrain_lora_ml",
    "linear_retrain_standard",
    "lora_linear_token",
    "lora_linear_token_backward",
    "lora_linear_weight",
    "lora_linear_weight_backward",
    "merge_lora",
    "merge_lora_backward",
    "merge_lora_symmetric",
    "merge_lora_symmetric_backward",
    "shallow_finetune",
    "shallow_retrain",
    "task_matvec",
    "task_matvec_backward",
)


def shim_table(shim: Any) -> dict[str, Any]:
    """By name, what `metalora.ops` calls when its CPU tensors are to take the CUDA code."""
    for name in OPERATORS:
        entry = torch._library.simple_registry.singleton.find(f"metalora::{name}")
        other = torch._library.simple_registry.singleton.find(f"metalora_shim::{name}")
        if other.fake_impl.kernel is None:
            torch.library.register_fake(f"metalora_shim::{name}", entry.fake_impl.kernel.func)
    return {name: getattr(shim, name).default for name in OPERATORS}


class Calls:
    """Replaces the operators by ones that note their names, to show what really runs."""

    def __init__(self, monkeypatch: Any) -> None:
        self.names: list[str] = []
        for name in OPERATORS:
            monkeypatch.setitem(_native._raw, name, self._noting(name, _native._raw[name]))

    def _noting(self, name: str, operator: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.names.append(name)
            return operator(*arguments)

        return call
