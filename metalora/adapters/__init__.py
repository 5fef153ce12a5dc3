"""Putting adapters into any model, taking them out, and reading a task's part."""

from metalora.adapters.config import LoRAConfig, as_lora_config
from metalora.adapters.insert import adapt
from metalora.adapters.removal import merge_and_unload, unload
from metalora.adapters.state import (
    adapted_layers,
    base_state_dict,
    freeze_base,
    load_base_state_dict,
    load_task_state_dict,
    reset_adapters,
    task_parameters,
    task_state_dict,
)

__all__ = [
    "LoRAConfig",
    "adapt",
    "adapted_layers",
    "as_lora_config",
    "base_state_dict",
    "freeze_base",
    "load_base_state_dict",
    "load_task_state_dict",
    "merge_and_unload",
    "reset_adapters",
    "task_parameters",
    "task_state_dict",
    "unload",
]
