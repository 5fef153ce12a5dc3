"""What PEFT must be told to build the same adapters, and what it will then look for."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from metalora._checks import first_line
from metalora.io.folder import PREFIX, SAVED_BY_TYPE
from metalora.io.twin import twin_of
from metalora.nn import TaskLayer
from metalora.nn.lora_layer import LoRALayer

_NO_TARGETS = "dummy-target-modules"  # PEFT's own word for an adapter of modules_to_save alone


def peft_lora_config(
    peft: Any, model: nn.Module, layers: dict[str, TaskLayer], task_type: str | None, base: str
) -> Any:
    """The ``peft.LoraConfig`` that says what the layers are."""
    heads = _heads_as_modules(model, layers)
    saved = [*heads, *SAVED_BY_TYPE.get(task_type or "", ())]
    # Adapters of what PEFT saves whole are merged into it.
    targets = {
        name: layer
        for name, layer in layers.items()
        if isinstance(layer, LoRALayer) and not _lies_in(f"{name}.weight", saved)
    }
    dropouts = {layer.dropout for layer in targets.values()}
    if len(dropouts) > 1:
        raise ValueError(
            "export_peft: all layers must have the same dropout, as peft knows one only; "
            f"got {sorted(dropouts)}"
        )
    ranks = {name: layer.rank for name, layer in targets.items()}
    alphas = {n: int(m.alpha) if m.alpha.is_integer() else m.alpha for n, m in targets.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    return peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        rank_pattern={f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        alpha_pattern={f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        lora_dropout=max(dropouts, default=0.0),
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in targets.values()),
        target_modules=_target_modules(model, list(targets)),
        modules_to_save=heads,
        task_type=task_type,
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _most_common(numbers: Iterable[Any]) -> Any:
    """Heads alone leave nothing to count; PEFT's own default is 8 then."""
    return max(Counter(numbers).items(), key=lambda item: item[1], default=(8, 0))[0]


def _target_modules(model: nn.Module, names: list[str]) -> list[str] | str:
    """The names; as a regular expression if one is also the end of another module's name."""
    if not names:
        return _NO_TARGETS
    others = {n for n, _ in model.named_modules()} - set(names)
    if any(other.endswith(f".{name}") for other in others for name in names):
        return "|".join(re.escape(name) for name in names)
    return names


def _heads_as_modules(model: nn.Module, layers: dict[str, TaskLayer]) -> list[str]:
    """The heads; instead of all there is in a module, that module."""
    heads = [layer for layer in layers.values() if not isinstance(layer, LoRALayer)]
    own = {id(p) for head in heads for p in head.parameters()}
    found: list[str] = []
    for name, module in model.named_modules():
        parameters = [id(p) for p in module.parameters()]
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and parameters and own.issuperset(parameters) and not inside:
            found.append(name)
    return found


def ask_peft(peft: Any, plain: nn.Module, settings: Any) -> tuple[set[str], list[str] | None]:
    """The names of the tensors that PEFT will look for, and of the modules it will save whole."""
    settings = copy.deepcopy(settings)  # PEFT adds to it
    settings.base_model_name_or_path = None
    try:
        theirs = peft.get_peft_model(twin_of(plain, empty=True), settings, low_cpu_mem_usage=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"export_peft: peft does not take these adapters: {first_line(error)}"
        ) from error
    wanted = set(peft.get_peft_model_state_dict(theirs, save_embedding_layers=False))
    saved = list(dict.fromkeys(settings.modules_to_save))
    return wanted, [name for name in saved if not _lies_in(name, saved)] or None


def _lies_in(name: str, modules: list[str]) -> bool:
    """Whether PEFT, which looks at the ends of names, finds one of the modules around ``name``."""
    parts = name.split(".")
    outer = [".".join(parts[:depth]) for depth in range(1, len(parts))]
    return any(place.endswith(tuple(modules)) for place in outer)


def check_complete(
    wanted: set[str], layers: dict[str, TaskLayer], shared: Mapping[str, Tensor]
) -> None:
    """Every adapter must be among what PEFT looks for, and all that it looks for be there."""
    have = {PREFIX + name for name in shared}
    for name, layer in layers.items():
        whole = f"{PREFIX}{name}.weight"
        parts = {f"{PREFIX}{name}.{factor}.weight" for factor in ("lora_A", "lora_B")}
        if whole not in wanted and not (isinstance(layer, LoRALayer) and parts <= wanted):
            raise ValueError(
                f"export_peft: peft would leave out {name!r}: its own rules for names do not find "
                "it, or find it in another module"
            )
        if isinstance(layer, LoRALayer):
            have |= parts
    if not wanted <= have:
        raise ValueError(
            f"export_peft: peft would look for {min(wanted - have)!r} too: the names of what is "
            "adapted are the ends of other modules' names; rename modules"
        )
