"""The configuration of `adapt`, and the conversion from PEFT's."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from typing import Any

from metalora._checks import check_choice, check_count, check_positive, check_probability, short
from metalora.ops import ROUTES


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers get adapters, and of what kind.

    Attributes:
        rank: rank r of the adapters.
        alpha: their scale is s = alpha / rank; None means rank, so s = 1.
        dropout: probability to drop an input of the adapters in training, 0 <= p < 1.
        target_modules: layers with an adapter: "all-linear"; a regular expression that a module's
            whole name matches; or names, of which one is the module's name or its last parts
            (``"query"`` or ``"attention.query"`` for ``"layer.0.attention.query"``).
            "all-linear" leaves out the heads, and what ``model.get_output_embeddings()`` returns.
        exclude_modules: regular expression or names, in the same form: never with an adapter, and
            no head. An entry that matches no module is an error.
        heads: names of the layers that exist once per task: nn.Linear, or nn.Embedding. A module's
            whole name means that module alone; any other name means all whose last parts it is.
            Naming a module that holds linear layers makes heads of them all.
        symmetric: whether the adapters are U_t U_tᵀ instead of B_t A_t; for square layers.
        route, keep_merged: how the layers compute, see `metalora.ops.lora_linear`.

    Raises:
        TypeError: if a field has a wrong type.
        ValueError: if a field is outside its range.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] = ()
    heads: Sequence[str] = ()
    symmetric: bool = False
    route: str = "auto"
    keep_merged: bool = False

    def __post_init__(self) -> None:
        numbers: dict[str, Any] = {"rank": check_count("LoRAConfig", "rank", self.rank)}
        if self.alpha is not None:
            numbers["alpha"] = check_positive("LoRAConfig", "alpha", self.alpha)
        numbers["dropout"] = check_probability("LoRAConfig", "dropout", self.dropout)
        for name, number in numbers.items():
            if type(getattr(self, name)) not in (int, float):  # but of NumPy, as accepted
                object.__setattr__(self, name, number)
        if self.symmetric and self.dropout > 0:
            raise ValueError("LoRAConfig: symmetric adapters have no dropout; set dropout=0")
        check_choice("LoRAConfig", "route", self.route, ROUTES)
        for name in ("target_modules", "exclude_modules"):
            if not isinstance(getattr(self, name), str):
                object.__setattr__(self, name, _names(name, getattr(self, name)))
        object.__setattr__(self, "heads", _names("heads", self.heads))


def as_lora_config(config: Any) -> LoRAConfig:
    """Returns ``config`` if it is a `LoRAConfig`, or converts a ``peft.LoraConfig``.

    Raises:
        TypeError: if it is neither.
        ValueError: if it sets a field of ``peft.LoraConfig`` that metalora does not support.
    """
    if isinstance(config, LoRAConfig):
        return config
    if type(config).__name__ == "LoraConfig" and hasattr(config, "lora_alpha"):
        return _from_peft(config)
    raise TypeError(
        f"adapt: lora_config must be a metalora.LoRAConfig or a peft.LoraConfig, "
        f"got {type(config).__name__}"
    )


_CONVERTED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "modules_to_save",
    "use_rslora",
}  # fmt: skip
# These describe an adapter's origin and purpose, not what it computes.
_DESCRIPTIVE = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "megatron_core",
    "fan_in_fan_out",  # which the layers themselves tell
}  # fmt: skip
# Layers that peft trains without being asked to.
_HEADS = {"SEQ_CLS": "classifier", "TOKEN_CLS": "classifier", "QUESTION_ANS": "qa_outputs"}


def check_peft_fields(
    where: str, kind: Any, values: Mapping[str, Any], ignored: Collection[str] = ()
) -> None:
    """Raises ValueError, naming the field, if it asks ``peft.LoraConfig`` for what metalora lacks.

    Args:
        where: what the error message starts with.
        kind: the class ``peft.LoraConfig``.
        values: its fields; those that are absent have their defaults.
        ignored: names of fields that may have any value.
    """
    for field in fields(kind):
        name = field.name
        if name in _CONVERTED or name in _DESCRIPTIVE or name in ignored or name not in values:
            continue
        default = field.default
        if field.default_factory is not MISSING:
            default = field.default_factory()
        if values[name] != default:
            raise ValueError(
                f"{where}: peft.LoraConfig field {name}={short(values[name])} is not supported by "
                f"metalora; leave it at {default!r}"
            )


def _from_peft(config: Any) -> LoRAConfig:
    check_peft_fields("adapt", type(config), vars(config))
    if config.target_modules is None:
        raise ValueError(
            "adapt: peft.LoraConfig field target_modules=None leaves the choice to peft; "
            "name the modules, or say 'all-linear'"
        )
    heads = config.modules_to_save or ()
    task_type = config.task_type.value if isinstance(config.task_type, Enum) else config.task_type
    if task_type in _HEADS and not heads:
        raise ValueError(
            f"adapt: with peft.LoraConfig field task_type={task_type!r} peft trains the last layer "
            f"too; name it, as in modules_to_save=[{_HEADS[task_type]!r}]"
        )
    alpha = config.lora_alpha * (math.sqrt(config.r) if config.use_rslora else 1.0)
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        targets = "all-linear"
    return LoRAConfig(
        rank=config.r,
        alpha=alpha,
        dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=config.exclude_modules or (),
        heads=heads,
    )


def _names(field: str, names: Any) -> tuple[str, ...]:
    """Names as a tuple; a set is sorted, so that nothing depends on its order."""
    if isinstance(names, str) or not isinstance(names, (list, tuple, set, frozenset)):
        got = f"{type(names).__name__} {names!r}"
        raise TypeError(f"LoRAConfig: {field} must be a list of names, got {got}")
    for name in names:
        if not isinstance(name, str) or not name:
            raise TypeError(f"LoRAConfig: {field} must hold non-empty names, got {name!r}")
    return tuple(sorted(names)) if isinstance(names, (set, frozenset)) else tuple(names)
