"""Reading PEFT folders as the tasks of an adapted model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from metalora._checks import check_module, short
from metalora._optional import require
from metalora.adapters import LoRAConfig, adapt, load_task_state_dict
from metalora.adapters.state import check_plain
from metalora.io.adapter_file import Adapter, read_adapter
from metalora.io.folder import PeftFolderError
from metalora.io.twin import twin_of


def import_peft(
    model: nn.Module, folders: str | Path | Sequence[str | Path], *, base: str | Path | None = None
) -> nn.Module:
    """Adapts ``model``, in place, with what PEFT wrote: every folder is a task, in their order.

    Layers in ``modules_to_save`` become heads. Other weights of the base, which PEFT writes of
    embeddings that were adapted or resized, must be those that ``model`` has. Adapters must be
    plain LoRA, and equal in their layers, ranks, scales and dropout; what was symmetric when it was
    exported comes back as B A.
    Nothing is downloaded.

    Args:
        model: the plain base model.
        folders: adapter folders, each with adapter_config.json and adapter_model.safetensors.
        base: the base model that the folders must name; None means the place that ``model`` was
            loaded from. A model that was not loaded fits every name.

    Returns:
        ``model``, with one task per folder.

    Raises:
        ImportError: if peft is not installed, or not in a supported version.
        TypeError: if an argument has a wrong type.
        ValueError: if ``model`` has adapters already, or ``folders`` is empty.
        PeftFolderError: if a folder cannot be read, is for another base, or differs from the
            others. The model is then as it was.
    """
    peft = require("peft", "import_peft")
    check_plain("import_peft", check_module("import_peft", model))
    paths = _paths(folders)
    base = base or getattr(model, "name_or_path", None)
    tasks = [read_adapter(peft, path, model, base) for path in paths]
    for task in tasks:
        _check_equal(task, tasks[0])
    try:
        _insert(twin_of(model, empty=True), tasks)
    except ValueError as error:
        raise PeftFolderError(f"import_peft: {paths[0]} does not fit the model: {error}") from None
    return _insert(model, tasks)


def _paths(folders: Any) -> list[Path]:
    given = [folders] if isinstance(folders, str | Path) else folders
    if not isinstance(given, Sequence) or not all(isinstance(f, str | Path) for f in given):
        raise TypeError(
            f"import_peft: folders must be a folder or a list of folders, got {short(folders)}"
        )
    if not given:
        raise ValueError("import_peft: folders must hold at least one folder, got none")
    return [Path(folder) for folder in given]


def _insert(model: nn.Module, tasks: list[Adapter]) -> nn.Module:
    first = tasks[0]
    for rank, alpha in sorted(set(first.layers.values())):
        names = [re.escape(n) for n, kind in first.layers.items() if kind == (rank, alpha)]
        targets = "|".join(names)
        config = LoRAConfig(rank, alpha, first.dropout, target_modules=targets)
        adapt(model, config, len(tasks))
    if first.heads:
        adapt(model, LoRAConfig(target_modules=(), heads=first.heads), len(tasks))
    for number, task in enumerate(tasks):
        load_task_state_dict(model, number, task.state)
    return model


def _check_equal(task: Adapter, first: Adapter) -> None:
    def check(what: str, ours: Any, others: Any) -> None:
        if ours != others:
            raise PeftFolderError(
                f"import_peft: {task.folder} does not go with {first.folder}: {what} {ours} "
                f"instead of {others}"
            )

    check("lora_dropout is", task.dropout, first.dropout)
    check("target_modules are", sorted(task.layers), sorted(first.layers))
    check("modules_to_save hold", sorted(task.heads), sorted(first.heads))
    check("the tensors are", sorted(task.state), sorted(first.state))
    for name, (rank, alpha) in task.layers.items():
        check(f"r of {name!r} is", rank, first.layers[name][0])
        check(f"the scaling of {name!r} is", alpha / rank, first.layers[name][1] / rank)
    for name, tensor in task.state.items():
        check(f"the shape of {name!r} is", list(tensor.shape), list(first.state[name].shape))
