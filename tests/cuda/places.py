"""Where the CUDA operators run in tests: on a GPU, or through the shim on CPU tensors."""

from __future__ import annotations

from typing import Any

import torch

from metalora.ops import _native


def shim_table(shim: Any) -> dict[str, Any]:
    """By name, what `metalora.ops` calls when its CPU tensors are to take the CUDA code."""
    for name in _native.operators:
        entry = torch._library.simple_registry.singleton.find(f"metalora::{name}")
        other = torch._library.simple_registry.singleton.find(f"metalora_shim::{name}")
        if other.fake_impl.kernel is None:
            torch.library.register_fake(f"metalora_shim::{name}", entry.fake_impl.kernel.func)
    return {name: getattr(shim, name).default for name in _native.operators}


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
