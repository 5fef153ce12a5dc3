"""The benchmarks of all operators, by the names of their modules."""

from __future__ import annotations

from importlib import import_module

from benchmarks.lib.cases import Benchmark

MODULES = (
    "lora_linear",
    "lora_linear_symmetric",
    "merge_lora",
    "shared_input",
    "task_matvec",
    "dropout_mask",
    "packed_attention",
    "token_losses",
    "linear_training",
    "shallow_training",
)


def benchmarks() -> dict[str, Benchmark]:
    """Imports them all."""
    return {name: import_module(f"benchmarks.{name}").BENCHMARK for name in MODULES}
