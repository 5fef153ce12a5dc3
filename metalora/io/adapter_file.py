"""Reading one adapter folder, with metalora's names for its tensors."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import did_you_mean, first_line, short
from metalora._files import read_tensors
from metalora.io.config_file import read_settings
from metalora.io.folder import CONFIG, PREFIX, WEIGHTS, PeftFolderError, restore
from metalora.nn.plain import is_conv1d, is_linear

_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


_BASE_LAYER = ".base_layer"


@dataclass(frozen=True)
class Adapter:
    """The contents of one folder, with metalora's names for its tensors."""

    folder: Path
    dropout: float
    layers: dict[str, tuple[int, float]]  # rank and alpha
    heads: list[str]
    state: dict[str, Tensor]  # as `metalora.task_state_dict` returns it


def read_adapter(peft: Any, folder: Path, model: nn.Module, base: str | Path | None) -> Adapter:
    """Reads ``folder`` as an adapter for the plain ``model``.

    Raises:
        PeftFolderError: if it cannot be read, or is for another base.
    """
    if not folder.is_dir():
        restore(folder.parent)
    if not folder.is_dir():
        raise PeftFolderError(
            f"import_peft: {folder} is no folder; an adapter of a hub must be downloaded first"
        )
    settings = read_settings(peft, folder)
    _check_base(folder, settings.base, base)
    ranks: dict[str, int] = {}
    heads: list[str] = []
    state: dict[str, Tensor] = {}
    for key, tensor in _read_tensors(folder).items():
        module, parameter, factor = _parts(folder, key, tensor)
        if factor is None:
            if module.endswith(_BASE_LAYER) or not settings.saves(module):
                _check_copy(
                    folder, model, f"{module.removesuffix(_BASE_LAYER)}.{parameter}", tensor
                )
                continue
            heads.append(module)
            state[f"{module}.{parameter}"] = tensor
            continue
        state[f"{module}.{factor}"] = tensor
        if factor == "lora_A":
            ranks[module] = tensor.shape[0]
    heads = list(dict.fromkeys(heads))
    _check_names(folder, model, [*ranks], heads)
    if settings.fan_in_fan_out and not any(is_conv1d(model.get_submodule(n)) for n in ranks):
        raise PeftFolderError(
            f"import_peft: {settings.path}: field fan_in_fan_out=True is for the Conv1D of "
            "transformers, but its layers are nn.Linear"
        )
    wanted, alphas = settings.ranks(ranks), settings.alphas(ranks)
    layers = {}
    for layer, rank in ranks.items():
        if rank != wanted[layer]:
            raise PeftFolderError(
                f"import_peft: {folder} has an adapter of rank {rank} for {layer!r}, but its "
                f"{CONFIG} says {wanted[layer]}"
            )
        layers[layer] = rank, alphas[layer] * (math.sqrt(rank) if settings.use_rslora else 1.0)
    return Adapter(folder, settings.dropout, layers, heads, state)


def _parts(folder: Path, key: str, tensor: Tensor) -> tuple[str, str, str | None]:
    """The module, its parameter, and which factor of an adapter that is: None for a head."""
    name = key.removeprefix(PREFIX)
    module, _, parameter = name.rpartition(".")
    factor = re.fullmatch(r"(.+)\.(lora_[AB])", module) if parameter == "weight" else None
    if "lora_embedding_" in name:
        raise PeftFolderError(
            f"import_peft: {folder / WEIGHTS} has {short(key)}: adapters on embeddings are not "
            "supported; have PEFT train the embedding as modules_to_save"
        )
    if name == key or not module or (factor and tensor.dim() != 2):
        raise PeftFolderError(
            f"import_peft: {folder / WEIGHTS} has {short(key)} of shape {list(tensor.shape)}, "
            "which is no part of a LoRA adapter"
        )
    if tensor.dtype not in _DTYPES:
        raise PeftFolderError(
            f"import_peft: {folder / WEIGHTS} has {short(key)} of {tensor.dtype}; the tensors of "
            "an adapter must be floating-point"
        )
    return (factor[1], parameter, factor[2]) if factor else (module, parameter, None)


def _check_copy(folder: Path, model: nn.Module, name: str, tensor: Tensor) -> None:
    """Passes over a weight of the base that PEFT has written too, as it does of embeddings."""
    known = dict(model.named_parameters(remove_duplicate=False))
    if name not in known:
        raise PeftFolderError(
            f"import_peft: {folder} is for another base: it has {short(name)}, which is no "
            f"parameter of the model{did_you_mean(name, known)}"
        )
    own = known[name].detach().cpu()
    if own.shape != tensor.shape or not torch.equal(own.to(tensor.dtype), tensor):
        raise PeftFolderError(
            f"import_peft: {folder} has other weights of the base for {short(name)}, "
            f"{list(tensor.shape)}; the model has {list(own.shape)}: load those into it first, or "
            "have PEFT train them as modules_to_save"
        )


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = [p.name for p in sorted(folder.glob("adapter_model.*"))]
        there = f"; {pickles[0]} is never read, save it as safetensors" if pickles else ""
        raise PeftFolderError(f"import_peft: {path} is missing{there}")
    try:
        tensors, _ = read_tensors(path, "import_peft")
    except ImportError:
        raise
    except Exception as error:
        raise PeftFolderError(f"import_peft: {path} is damaged: {first_line(error)}") from None
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


def _check_names(folder: Path, model: nn.Module, layers: list[str], heads: list[str]) -> None:
    modules = dict(model.named_modules())
    linears = {name for name, module in modules.items() if is_linear(module)}
    for names, known, what in ((layers, linears, "linear layer"), (heads, modules, "module")):
        for name in names:
            if name not in known:
                raise PeftFolderError(
                    f"import_peft: {folder} is for another base: it has an adapter for "
                    f"{short(name)}, which is no {what} of the model{did_you_mean(name, known)}"
                )
