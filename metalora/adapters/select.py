"""The modules of a model that a configuration names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from metalora._checks import FLOATS, did_you_mean
from metalora._warn import warn_user
from metalora.adapters.config import LoRAConfig
from metalora.adapters.known_models import reader_of_weight
from metalora.nn import TaskLayer
from metalora.nn.plain import features_of, is_conv1d, is_linear

_ADAPTED = "it has one already; metalora.unload(model) takes adapters out"


@dataclass(frozen=True)
class Selection:
    """The layers to replace, each with all its names: a module may stand in two places."""

    targets: list[tuple[nn.Module, list[str]]]
    heads: list[tuple[nn.Module, list[str]]]


def select(model: nn.Module, config: LoRAConfig) -> Selection:
    """Finds the layers that ``config`` names in ``model``.

    Raises:
        ValueError: if a name is unknown, means a module that cannot be adapted, or nothing is left.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    _check_not_quantised(modules)
    excluded = _matches("exclude_modules", config.exclude_modules, modules)
    head_names = _find_heads(modules, config.heads, excluded)
    target_names = _find_targets(model, modules, config, {*head_names, *excluded})
    if not target_names and not head_names:
        raise ValueError(
            "adapt: nothing to adapt: target_modules and heads match no linear layer of the model"
        )
    if "" in target_names or "" in head_names:
        raise ValueError(
            "adapt: the model itself is the layer; put it into a container, "
            "as in nn.Sequential(model)"
        )
    targets, heads = _group(modules, target_names), _group(modules, head_names)
    _check_heads_untied(modules, heads)
    return Selection(targets, heads)


def _check_not_quantised(modules: dict[str, nn.Module]) -> None:
    """A base whose weights are integers or of 8 bits cannot be retrained."""
    for name, module in modules.items():
        other = isinstance(module, nn.Linear) and module.weight.dtype not in FLOATS
        if isinstance(module, nn.Linear) and module.weight.dtype.is_complex:
            raise ValueError(
                f"adapt: {name!r} has weights of {module.weight.dtype}; real ones work"
            )
        if other or getattr(module, "hf_quantizer", None) is not None:
            what = f"{name!r}, a {type(module).__name__}," if name else "the model"
            raise ValueError(
                f"adapt: {what} is quantised; quantised bases are not supported, load it "
                "without quantization_config"
            )


def check_linear_alone(model: nn.Module, config: LoRAConfig) -> None:
    """Raises ValueError if the pattern also matches non-linear layers, which PEFT would adapt."""
    pattern = config.target_modules
    if not isinstance(pattern, str) or pattern == "all-linear":
        return
    for name, module in model.named_modules():
        other = module._parameters and not _is_layer(module)
        if other and re.fullmatch(pattern, name):
            raise ValueError(
                f"adapt: target_modules: {pattern!r} also means {name!r}, a "
                f"{type(module).__name__}, which cannot get an adapter; narrow the pattern"
            )


def check_fan_in_fan_out(config: Any, selection: Selection) -> None:
    """Raises ValueError if a ``peft.LoraConfig`` takes layers for Conv1D of which none is."""
    if config.fan_in_fan_out and not any(is_conv1d(layer) for layer, _ in selection.targets):
        raise ValueError(
            "adapt: peft.LoraConfig field fan_in_fan_out=True is for the Conv1D of transformers, "
            "but all target_modules are nn.Linear; leave it at False"
        )


def _find_heads(
    modules: dict[str, nn.Module], wanted: Sequence[str], excluded: list[str]
) -> list[str]:
    """The layers that the names mean; a module's whole name means that module alone."""
    found = []
    for name in wanted:
        matches = [name] if name in modules else [full for full in modules if _named(full, name)]
        if not matches:
            raise _unknown("heads", name, modules)
        matches = [match for match in matches if match not in excluded]
        if not matches:
            raise ValueError(
                f"adapt: heads: exclude_modules leaves nothing of {name!r}; leave it out of one of "
                "the two"
            )
        for match in matches:
            inside = [full for full in modules if full == match or full.startswith(f"{match}.")]
            for full in inside:
                if isinstance(modules[full], TaskLayer):
                    raise ValueError(f"adapt: heads: {full!r} cannot be a head: {_ADAPTED}")
            layers = [full for full in inside if isinstance(modules[full], nn.Linear)]
            if isinstance(modules[match], nn.Embedding):
                layers = [match]
            _check_nothing_else(modules, match, layers)
            found += [layer for layer in layers if layer not in excluded]
    for name in found:
        module = modules[name]
        if isinstance(module, nn.Embedding):
            obstacle = _obstacle_of_embedding(module)
        else:
            obstacle = _obstacle(modules, name)
        if obstacle:
            raise ValueError(f"adapt: heads: {name!r} cannot be a head: {obstacle}")
    return list(dict.fromkeys(found))


def _obstacle_of_embedding(module: nn.Embedding) -> str:
    """Why there cannot be one for each task; "" if there can."""
    if type(module) is not nn.Embedding:
        return f"it is a {type(module).__name__}, not an nn.Embedding"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "its max_norm, scale_grad_by_freq and sparse must not be set"
    return _hooks(module)


def _check_nothing_else(modules: dict[str, nn.Module], head: str, linears: list[str]) -> None:
    """A head made of modules must hold parameters in linear layers only: those get one per task."""
    own = {id(p) for name in linears for p in modules[name].parameters()}
    left = [name for name, p in modules[head].named_parameters() if id(p) not in own]
    if left or not linears:
        what = f"its parameters {left[:3]} are in none" if left else "there is none in it"
        raise ValueError(
            f"adapt: heads: {head!r} is a {type(modules[head]).__name__}; "
            f"a head is made of nn.Linear layers, but {what}"
        )


def _find_targets(
    model: nn.Module, modules: dict[str, nn.Module], config: LoRAConfig, excluded: set[str]
) -> list[str]:
    if config.target_modules == "all-linear":
        excluded |= _output_embedding(model, modules)
        return _all_linear(modules, excluded, config.symmetric)
    matches = _matches("target_modules", config.target_modules, modules)
    found = [n for n in matches if n not in excluded]
    for name in found:
        obstacle = _obstacle(modules, name, config.symmetric)
        if obstacle:
            raise ValueError(f"adapt: target_modules: {name!r} cannot get an adapter: {obstacle}")
    return found


def _all_linear(modules: dict[str, nn.Module], excluded: set[str], symmetric: bool) -> list[str]:
    linears = [n for n, m in modules.items() if _is_layer(m)]
    found, skipped = [], []
    for name in linears:
        if name in excluded:
            continue
        obstacle = _obstacle(modules, name, symmetric)
        if isinstance(modules[name], TaskLayer):
            raise ValueError(f"adapt: target_modules: {name!r} cannot get an adapter: {obstacle}")
        if obstacle:
            skipped.append(f"{name!r} ({obstacle})")
        else:
            found.append(name)
    if skipped:
        warn_user(f"adapt: all-linear leaves out {', '.join(skipped)}")
    return found


def _output_embedding(model: nn.Module, modules: dict[str, nn.Module]) -> set[str]:
    """The language-model head of a Hugging Face model, which PEFT's all-linear leaves out too."""
    getter = getattr(model, "get_output_embeddings", None)
    output = getter() if callable(getter) else None
    return set() if output is None else {n for n, m in modules.items() if m is output}


def _obstacle(modules: dict[str, nn.Module], name: str, symmetric: bool = False) -> str:
    """Why the module cannot be replaced by a layer of ours; "" if it can."""
    module = modules[name]
    parent = modules.get(name.rpartition(".")[0])
    if isinstance(module, TaskLayer):
        return _ADAPTED
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls it"
    if reader := reader_of_weight(modules, name):
        return f"{reader} reads its weight"
    if holder := _holder(modules, name):
        return f"{holder} holds it too, in plain Python, where it cannot be replaced"
    if type(module) is not nn.Linear and not is_conv1d(module):
        return f"it is a {type(module).__name__}, not an nn.Linear"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return "its size is not known yet; run the model once"
    if hooks := _hooks(module):
        return hooks
    for buffer, value in module._buffers.items():
        if value is not None:
            return f"its buffer {buffer!r} would be lost"
    inner, outer = features_of(module)
    if symmetric and inner != outer:
        return f"a symmetric adapter needs a square layer, got [out={outer}, in={inner}]"
    return ""


def _holder(modules: dict[str, nn.Module], name: str) -> str:
    """What around the module holds it without registering it, as a list does; or ""."""
    parts = name.split(".")
    for depth in range(len(parts)):
        outer = modules[".".join(parts[:depth])]
        for attribute, value in vars(outer).items():
            if attribute != "_modules" and _holds(value, modules[name]):
                return f"{attribute!r} of the {type(outer).__name__}"
    return ""


def _holds(value: Any, module: nn.Module, depth: int = 3) -> bool:
    """Whether it is the module, or a container of it in so many containers at most."""
    if isinstance(value, dict):
        value = [*value.values()]
    if depth and isinstance(value, list | tuple):
        return any(_holds(one, module, depth - 1) for one in value)
    return value is module


def _hooks(module: nn.Module) -> str:
    hooks = (module._forward_hooks, module._forward_pre_hooks)
    if any(hooks) or module._backward_hooks or module._backward_pre_hooks:
        return "it has hooks (weight_norm, offloading, ...), which would be lost"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance, which would be lost"
    return ""


def _is_layer(module: nn.Module) -> bool:
    """Whether a pattern may mean it: a linear layer, or one that has adapters already."""
    return is_linear(module) or isinstance(module, TaskLayer)


def _group(modules: dict[str, nn.Module], names: list[str]) -> list[tuple[nn.Module, list[str]]]:
    """Each module once, with all its names; all of which must have been selected."""
    groups = []
    for name in names:
        module = modules[name]
        places = [n for n, m in modules.items() if m is module]
        missing = [n for n in places if n not in names]
        if missing:
            raise ValueError(
                f"adapt: {name!r} and {missing[0]!r} are one and the same module; "
                "select both or neither"
            )
        if name == places[0]:
            groups.append((module, places))
    return groups


def _check_heads_untied(
    modules: dict[str, nn.Module], heads: list[tuple[nn.Module, list[str]]]
) -> None:
    for head, names in heads:
        for other, module in modules.items():
            shared = any(p is head.weight for p in module._parameters.values())
            if shared and module is not head:
                raise ValueError(
                    f"adapt: heads: {names[0]!r} shares its weight with {other!r}, which cannot "
                    "exist once per task; untie them first"
                )


def _named(full: str, name: str) -> bool:
    return full == name or full.endswith(f".{name}")


def _matches(field: str, wanted: str | Sequence[str], modules: dict[str, nn.Module]) -> list[str]:
    """The modules' names that the regular expression matches, or that are in the list.

    Of what a regular expression matches only linear layers count; in a list every name must match.
    """
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error as error:
            raise ValueError(
                f"adapt: {field}: {wanted!r} is no valid regular expression ({error}); "
                "for names give a list"
            ) from None
        linears = [n for n, m in modules.items() if _is_layer(m)]
        found = [n for n in linears if pattern.fullmatch(n)]
        if not found:
            raise _unknown(field, wanted, modules, is_pattern=True)
        return found
    for name in wanted:
        if not any(_named(full, name) for full in modules):
            raise _unknown(field, name, modules)
    return [full for full in modules if any(_named(full, name) for name in wanted)]


def _unknown(
    field: str, name: str, modules: dict[str, nn.Module], *, is_pattern: bool = False
) -> ValueError:
    if is_pattern and any(_named(full, name) for full in modules):
        return ValueError(
            f"adapt: {field}: no module of the model matches {name!r}: a string is a regular "
            f"expression for the whole module name; for names give a list, as in [{name!r}]"
        )
    linears = [n for n, m in modules.items() if n and is_linear(m)]
    if field == "heads":
        linears.reverse()  # heads come last, and may be made of modules
    meant = [n for n in modules if n] if field == "heads" else linears
    suffixes = [n.rpartition(".")[2] for n in meant]
    hint = did_you_mean(name, dict.fromkeys(suffixes + linears))
    if not hint and linears:
        hint = f"; there are {', '.join(repr(n) for n in linears[:5])}"
        hint += ", ..." if len(linears) > 5 else ""
    reading = " (a string is a regular expression for the whole module name)" if is_pattern else ""
    return ValueError(f"adapt: {field}: no module of the model matches {name!r}{hint}{reading}")
