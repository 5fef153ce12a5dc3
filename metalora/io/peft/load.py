"""Reading PEFT folders as the tasks of an adapted model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from metalora._checks import did_you_mean
from metalora._optional import require
from metalora.adapters import LoRAConfig, adapt, adapted_layers, load_task_state_dict
from metalora.adapters.config import check_peft_config
from metalora.io.peft.folder import CONFIG, PREFIX, WEIGHTS, PeftFolderError
from metalora.io.peft.twin import twin_of

# The tensors' names tell which layers have an adapter; patterns are read here.
_READ_HERE = {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_INITS = (True, False, "gaussian", "orthogonal")  # others may change the base too


@dataclass(frozen=True)
class _Adapter:
    """What is in one folder, under metalora's names."""

    folder: Path
    dropout: float
    layers: dict[str, tuple[int, float]]  # rank and alpha
    heads: list[str]
    state: dict[str, Tensor]  # as `metalora.task_state_dict` returns it


def import_peft(
    model: nn.Module, folders: str | Path | Sequence[str | Path], *, base: str | Path | None = None
) -> nn.Module:
    """Adapts ``model``, in place, with what PEFT wrote: every folder is a task, in their order.

    Layers in ``modules_to_save`` become heads. Adapters must be plain LoRA, and equal in their
    layers, ranks, scales and dropout; what was symmetric when it was exported comes back as B A.
    Nothing is downloaded.

    Args:
        model: the plain base model.
        folders: adapter folders, each with adapter_config.json and adapter_model.safetensors.
        base: the base model that the folders must name; None means where ``model`` was loaded
            from. A model that was built and not loaded goes with every name.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"import_peft: model must be an nn.Module, got {type(model).__name__}")
    if adapted_layers(model):
        raise ValueError(
            "import_peft: the model has adapters already; metalora.remove(model) takes them out"
        )
    paths = [Path(f) for f in ([folders] if isinstance(folders, str | Path) else folders)]
    if not paths:
        raise ValueError("import_peft: folders must hold at least one folder, got none")
    base = base or getattr(model, "name_or_path", None)
    tasks = [_read(peft, path, base) for path in paths]
    for task in tasks:
        _check_layers(task, model)
        _check_equal(task, tasks[0])
    try:
        _insert(twin_of(model, empty=True), tasks)
    except ValueError as error:
        raise PeftFolderError(f"import_peft: {paths[0]} does not fit the model: {error}") from None
    return _insert(model, tasks)


def _insert(model: nn.Module, tasks: list[_Adapter]) -> nn.Module:
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


def _read(peft: Any, folder: Path, base: str | Path | None) -> _Adapter:
    if not folder.is_dir():
        raise PeftFolderError(
            f"import_peft: {folder} is no folder; an adapter of a hub must be downloaded first"
        )
    try:
        return _parse(peft, folder, base)
    except PeftFolderError:
        raise
    except (AttributeError, TypeError, ValueError, re.error) as error:  # anything is in a file
        raise PeftFolderError(f"import_peft: {folder} is damaged: {error}") from None


def _parse(peft: Any, folder: Path, base: str | Path | None) -> _Adapter:
    config = _read_config(peft, folder)
    _check_base(folder, config.base_model_name_or_path, base)
    layers: dict[str, tuple[int, float]] = {}
    heads: list[str] = []
    state: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(folder).items():
        name = key.removeprefix(PREFIX)
        factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", name)
        if name == key or (factor and tensor.dim() != 2):
            raise PeftFolderError(
                f"import_peft: {folder} has {key!r} of shape {list(tensor.shape)}, which is no "
                "part of a LoRA adapter"
            )
        if factor is None:
            heads.append(name.rpartition(".")[0])
            state[name] = tensor
            continue
        layer, side = factor.groups()
        state[f"{layer}.{side}"] = tensor
        if side == "lora_A":
            layers[layer] = _rank_and_alpha(folder, config, layer, tensor.shape[0])
    return _Adapter(folder, float(config.lora_dropout), layers, list(dict.fromkeys(heads)), state)


def _rank_and_alpha(folder: Path, config: Any, layer: str, rank: int) -> tuple[int, float]:
    wanted = _by_pattern(config.rank_pattern, layer, config.r)
    if rank != wanted:
        raise PeftFolderError(
            f"import_peft: {folder} has an adapter of rank {rank} for {layer!r}, but its {CONFIG} "
            f"says {wanted}"
        )
    alpha = _by_pattern(config.alpha_pattern, layer, config.lora_alpha)
    return rank, float(alpha * math.sqrt(rank) if config.use_rslora else alpha)


def _by_pattern(patterns: dict[str, Any], layer: str, otherwise: Any) -> Any:
    """A layer's own value, as PEFT finds it: keys are regular expressions for a name's end."""
    for key, value in patterns.items():
        if re.match(rf"(.*\.)?({key})$", layer):
            return value
    return otherwise


def _read_config(peft: Any, folder: Path) -> Any:
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PeftFolderError(f"import_peft: {path} cannot be read: {error}") from None
    kind = values.get("peft_type") if isinstance(values, dict) else values
    if kind != "LORA":
        raise PeftFolderError(f"import_peft: {path} must have peft_type 'LORA', got {kind!r}")
    known = {f.name for f in fields(peft.LoraConfig)}
    unknown = [name for name, value in values.items() if value and name not in known]
    if unknown:
        raise PeftFolderError(
            f"import_peft: {path} has the field {unknown[0]!r}, which peft {peft.__version__} does "
            "not know; upgrade peft"
        )
    config = peft.LoraConfig(**{n: value for n, value in values.items() if n in known})
    ignored = _READ_HERE | ({"init_lora_weights"} if config.init_lora_weights in _INITS else set())
    try:
        check_peft_config(f"import_peft: {path}", config, ignored)
    except ValueError as error:
        raise PeftFolderError(str(error)) from None
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    import safetensors

    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in sorted(folder.glob("adapter_model.*"))]
        there = f"; {pickles[0]} is never read, save it as safetensors" if pickles else ""
        raise PeftFolderError(f"import_peft: {path} is missing{there}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise PeftFolderError(f"import_peft: {path} is damaged: {error}") from None
    if not tensors:
        raise PeftFolderError(f"import_peft: {path} holds no tensors")
    return tensors


def _check_base(folder: Path, named: str | None, wanted: str | Path | None) -> None:
    if not named or not wanted or str(wanted) == named:
        return
    if Path(wanted).exists() and Path(wanted).resolve() == Path(named).resolve():
        return
    raise PeftFolderError(
        f"import_peft: {folder} is for another base: for {named!r}, but the model is "
        f"{str(wanted)!r}; if that is the same, say base={named!r}"
    )


def _check_layers(task: _Adapter, model: nn.Module) -> None:
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for name in task.layers:
        if name not in linears:
            raise PeftFolderError(
                f"import_peft: {task.folder} is for another base: it has an adapter for {name!r}, "
                f"which is no nn.Linear of the model{did_you_mean(name, linears)}"
            )


def _check_equal(task: _Adapter, first: _Adapter) -> None:
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
