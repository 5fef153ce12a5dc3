"""Reading an adapter_config.json that is not trusted."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from metalora._checks import check_count, check_positive, check_probability, short
from metalora.adapters.config import check_peft_fields
from metalora.io.folder import CONFIG, SAVED_BY_TYPE, PeftFolderError
from metalora.io.patterns import PatternError, first_matches

_MOST_BYTES = 2**24
# The tensors' names tell which layers have an adapter; patterns are read here.
_READ_HERE = {"rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern"}
_INITS = (True, False, "gaussian", "orthogonal")  # others may change the base too


@dataclass(frozen=True)
class Settings:
    """The fields of adapter_config.json that the adapters are read by."""

    path: Path
    base: str | None
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    fan_in_fan_out: bool
    saved: tuple[str, ...]
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]

    def saves(self, module: str) -> bool:
        """Whether PEFT, which looks at the ends of names, saves a module or one around it whole."""
        parts = module.split(".")
        places = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
        return any(place.endswith(self.saved) for place in places)

    def ranks(self, layers: Iterable[str]) -> dict[str, int]:
        """The rank of each of these layers of the model."""
        return self._by_pattern("rank_pattern", layers, self.rank)

    def alphas(self, layers: Iterable[str]) -> dict[str, float]:
        """The alpha of each of these layers of the model."""
        return self._by_pattern("alpha_pattern", layers, self.alpha)

    def _by_pattern(self, field: str, layers: Iterable[str], otherwise: Any) -> dict[str, Any]:
        patterns: dict[str, Any] = getattr(self, field)
        names = tuple(layers)
        try:
            places = first_matches(tuple(patterns), names)
        except PatternError as error:
            pattern = short(list(patterns)[error.place])
            raise PeftFolderError(f"import_peft: {self.path}: {field}: {pattern} {error}") from None
        values = [*patterns.values()]
        chosen = [otherwise if place is None else values[place] for place in places]
        return dict(zip(names, chosen, strict=True))


def read_settings(peft: Any, folder: Path) -> Settings:
    """Reads the folder's adapter_config.json, without running peft's code on its contents.

    Raises:
        PeftFolderError: if it cannot be read, is not LoRA's, or a field has a wrong type, lies
            outside its range, or asks for what metalora lacks.
    """
    path = folder / CONFIG
    values = _read(path)
    kind = values.get("peft_type") if isinstance(values, dict) else values
    if kind != "LORA":
        raise PeftFolderError(f"import_peft: {path} must have peft_type 'LORA', got {short(kind)}")
    known = {f.name for f in fields(peft.LoraConfig)}
    unknown = [name for name, value in values.items() if value and name not in known]
    if unknown:
        raise PeftFolderError(
            f"import_peft: {path} has the field {short(unknown[0])}, which peft {peft.__version__} "
            "does not know; upgrade peft"
        )
    try:
        return _parse(path, peft.LoraConfig, values)
    except (TypeError, ValueError) as error:
        raise PeftFolderError(str(error)) from None


def _read(path: Path) -> Any:
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes, more than {_MOST_BYTES}")
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        reason = "it is nested too deeply"
    except (OSError, ValueError) as error:
        reason = str(error)
    raise PeftFolderError(f"import_peft: {path} cannot be read: {reason}")


def _parse(path: Path, kind: Any, values: dict[str, Any]) -> Settings:
    where = f"import_peft: {path}"
    for name, wanted in _TYPES.items():
        if name in values:
            wanted.check(where, name, values[name])
    init = values.get("init_lora_weights", True)
    ignored: Collection[str] = _READ_HERE
    if isinstance(init, bool | str) and init in _INITS:
        ignored = _READ_HERE | {"init_lora_weights"}
    check_peft_fields(where, kind, values, ignored)
    given = {f.name: values.get(f.name, f.default) for f in fields(kind)}
    return Settings(
        path=path,
        base=given["base_model_name_or_path"],
        rank=check_count(where, "r", given["r"]),
        alpha=check_positive(where, "lora_alpha", given["lora_alpha"]),
        dropout=check_probability(where, "lora_dropout", given["lora_dropout"]),
        use_rslora=given["use_rslora"],
        fan_in_fan_out=given["fan_in_fan_out"],
        saved=_saved(given["modules_to_save"], given["task_type"]),
        rank_pattern=_patterns(where, "rank_pattern", values, _INTEGER, check_count),
        alpha_pattern=_patterns(where, "alpha_pattern", values, _NUMBER, check_positive),
    )


def _saved(named: str | list[str] | None, task_type: str | None) -> tuple[str, ...]:
    """What PEFT saves whole; before 0.11 it did not write down what a type of task adds."""
    names = [named] if isinstance(named, str) else named or []
    return (*names, *SAVED_BY_TYPE.get(task_type or "", ()))


def _patterns(
    where: str,
    field: str,
    values: dict[str, Any],
    wanted: _Type,
    check: Callable[[str, str, Any], Any],
) -> dict[str, Any]:
    found = {}
    for key, value in (values.get(field) or {}).items():
        name = f"{field}[{short(key)}]"
        wanted.check(where, name, value)
        found[key] = check(where, name, value)
    return found


@dataclass(frozen=True)
class _Type:
    """A type of JSON, in the words of an error message."""

    words: str
    accepts: Callable[[Any], bool]

    def check(self, where: str, name: str, value: Any) -> None:
        """Raises TypeError if ``value`` is of another type."""
        if not self.accepts(value):
            raise TypeError(f"{where}: {name} must be {self.words}, got {short(value)}")


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is kind for entry in value)


_TEXT = _Type("a string or null", lambda v: v is None or isinstance(v, str))
_NAMES = _Type(
    "a string, a list of strings or null",
    lambda v: v is None or isinstance(v, str) or _is_list_of(str, v),
)
_LAYERS = _Type(
    "an integer, a list of integers or null",
    lambda v: v is None or type(v) is int or _is_list_of(int, v),
)
_INTEGER = _Type("an integer", lambda v: type(v) is int)
_NUMBER = _Type("a number", lambda v: type(v) in (int, float))
_FLAG = _Type("true or false", lambda v: isinstance(v, bool))
_MAPPING = _Type("an object or null", lambda v: v is None or isinstance(v, dict))
_TYPES = {
    "task_type": _TEXT,
    "auto_mapping": _MAPPING,
    "peft_version": _TEXT,
    "base_model_name_or_path": _TEXT,
    "revision": _TEXT,
    "inference_mode": _FLAG,
    "fan_in_fan_out": _FLAG,
    "r": _INTEGER,
    "lora_alpha": _NUMBER,
    "lora_dropout": _NUMBER,
    "target_modules": _NAMES,
    "exclude_modules": _NAMES,
    "modules_to_save": _NAMES,
    "use_rslora": _FLAG,
    "layers_to_transform": _LAYERS,
    "layers_pattern": _NAMES,
    "rank_pattern": _MAPPING,
    "alpha_pattern": _MAPPING,
    "megatron_core": _TEXT,
}
