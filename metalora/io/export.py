"""Writing adapters as PEFT folders."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import check_choice, check_module
from metalora._optional import require
from metalora.adapters import adapt, adapted_layers, load_task_state_dict, unload
from metalora.adapters.state import unwrapped
from metalora.io.card import adapter_card, base_card
from metalora.io.folder import (
    BASE,
    CARD,
    CONFIG,
    PREFIX,
    WEIGHTS,
    check_target,
    replacing,
)
from metalora.io.settings import ask_peft, check_complete, peft_lora_config
from metalora.io.twin import twin_of
from metalora.nn import TaskLayer
from metalora.nn.lora_layer import LoRALayer

# For the first three PEFT saves further modules whole, such as the classifier; causal models it
# lets generate. Others need no task type.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}
_HUB_NAME = r"[\w.-]+(/[\w.-]+)?"


def export_peft(
    model: nn.Module,
    folder: str | Path,
    *,
    adapters: Sequence[Mapping[str, Tensor]] | None = None,
    lora_config: Any = None,
    names: Sequence[str] | None = None,
    base: str | Path | None = None,
    task_type: str | None = "auto",
    tokenizer: Any = None,
    metrics: Mapping[str, float | Sequence[float]] | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Writes the shared weights, and for every task a folder that PEFT loads.

    ``folder/base`` is the plain model, heads averaged over tasks, written by its
    ``save_pretrained``; ``folder/<name>`` holds a task's adapter_config.json,
    adapter_model.safetensors and model card, for ``peft.PeftModel.from_pretrained(base, ...)``.
    Heads travel in PEFT's ``modules_to_save``, whole modules where all of it is a head. What PEFT
    saves whole by itself, such as the classifier of a "SEQ_CLS" model, is written too; adapters in
    there are merged into it. A symmetric adapter U Uᵀ is written as B = U, A = Uᵀ.

    The adapters name their base by its absolute path, as PEFT looks up a relative one from wherever
    a program is started. After moving the folder load the base yourself and give it to
    ``PeftModel.from_pretrained``, which does not look at that name; ``peft.AutoPeftModel`` does.

    Args:
        model: an adapted model; or, with ``adapters``, a plain one. It stays as it is.
        folder: it must be empty or not exist, and appears as a whole at the end. A killed process
            leaves what was there before; on file systems that cannot exchange folders, such as most
            network file systems, it may be missing until the next `export_peft` or `import_peft` of
            it puts it back.
        adapters: what `metalora.task_state_dict` returned for each task, as the ``adapters`` of
            what `metalora.meta.lora_ml` returns.
        lora_config: with ``adapters``: the `LoRAConfig` or ``peft.LoraConfig`` they were made with.
        names: the tasks' folders; None means task_0, task_1, ...
        base: folder or hub name of a model that has the shared weights already, as after
            fine-tuning; it is then referred to, and no base is written.
        task_type: PEFT's; "auto" takes it from the model's class (sequence and token
            classification, question answering, causal language models), None writes none.
        tokenizer: saved with the base, by its ``save_pretrained``.
        metrics: for the model cards: a number goes into every card, a list gives one per task.
        overwrite: whether an earlier export in ``folder`` is replaced.

    Returns:
        The adapters' folders, in the order of the tasks.

    Raises:
        ImportError: if peft is not installed, or not in a supported version.
        TypeError, ValueError: if arguments do not fit, or PEFT cannot express the adapters.
        PeftFolderError: if the folder is not free or could not be written. It is then as before.
    """
    peft = require("peft", "export_peft")
    folder = Path(folder).resolve()
    check_target(folder, overwrite)
    model = unwrapped(check_module("export_peft", model))
    adapted = _adapted_twin(model, adapters, lora_config)
    layers = adapted_layers(adapted)
    _check_untied(adapted, layers)
    num_tasks = next(iter(layers.values())).num_tasks
    names = _task_names(names, num_tasks)
    shared_metrics, own_metrics = _metrics_of(metrics or {}, num_tasks)
    base_name = _base_name(model, base, tokenizer, folder)
    if task_type == "auto":
        task_type = _task_type_of(model)
    elif task_type is not None:
        check_choice("export_peft", "task_type", task_type, [t.value for t in peft.TaskType])
    plain = unload(twin_of(adapted)) if adapters is None else twin_of(model)
    shared = plain.state_dict()
    settings = peft_lora_config(peft, adapted, layers, task_type, base_name)
    wanted, settings.modules_to_save = ask_peft(peft, plain, settings)
    check_complete(wanted, layers, shared)
    with replacing(folder) as partial:
        if base is None:
            origin = getattr(model, "name_or_path", None) or None
            card = base_card(folder.name, origin, num_tasks, shared_metrics)
            _write_base(partial / BASE, plain, tokenizer, card)
        for task, name in enumerate(names):
            tensors = {key: _tensor(key, task, layers, shared) for key in sorted(wanted)}
            card = adapter_card(name, base_name, own_metrics[task])
            _write_adapter(partial / name, tensors, _as_json(settings, model), card)
    return [folder / name for name in names]


def _adapted_twin(
    model: nn.Module, adapters: Sequence[Mapping[str, Tensor]] | None, lora_config: Any
) -> nn.Module:
    twin = twin_of(model)
    if (adapters is None) != (lora_config is None):
        raise ValueError(
            "export_peft: adapters and lora_config come together; give both or neither"
        )
    if adapters is None:
        if not adapted_layers(model):
            raise ValueError(
                "export_peft: the model has no adapters; for those of a result say "
                "adapters=result.adapters and the lora_config they were made with"
            )
        return twin
    if adapted_layers(model):
        raise ValueError(
            "export_peft: the model has adapters already; leave adapters out to export those, or "
            "take them out with metalora.unload(model)"
        )
    if not adapters:
        raise ValueError("export_peft: adapters must hold at least one task, got none")
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng([d.index for d in devices]):  # what is drawn is overwritten
        adapt(twin, lora_config, len(adapters))
    for task, state in enumerate(adapters):
        load_task_state_dict(twin, task, state)
    return twin


def _check_untied(model: nn.Module, layers: dict[str, TaskLayer]) -> None:
    for name, layer in layers.items():
        places = [n for n, m in model.named_modules(remove_duplicate=False) if m is layer]
        if len(places) > 1:
            raise ValueError(
                f"export_peft: {name!r} and {places[1]!r} are one and the same module, which peft "
                "would adapt in the first place only"
            )


def _task_names(names: Sequence[str] | None, num_tasks: int) -> list[str]:
    if names is None:
        return [f"task_{task}" for task in range(num_tasks)]
    if isinstance(names, str) or len(names) != num_tasks or len(set(names)) != num_tasks:
        raise ValueError(
            f"export_peft: names must be {num_tasks} different names, one per task, got {names!r}"
        )
    for name in names:
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]*", name) or name == BASE:
            raise ValueError(
                f"export_peft: names must be folder names of letters, digits, '_', '-' and '.', "
                f"and not {BASE!r}; got {name!r}"
            )
    return list(names)


def _metrics_of(
    metrics: Mapping[str, float | Sequence[float]], num_tasks: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """What stands in all cards, and what stands in each task's."""
    shared: dict[str, float] = {}
    own: list[dict[str, float]] = [{} for _ in range(num_tasks)]
    for name, value in metrics.items():
        values = [value] * num_tasks if isinstance(value, Real) else value
        if not isinstance(values, Sequence) or not all(isinstance(v, Real) for v in values):
            values = ()
        if len(values) != num_tasks:
            raise ValueError(
                f"export_peft: metrics: {name!r} must be a number, or one per task "
                f"({num_tasks}), got {value!r}"
            )
        if isinstance(value, Real):
            shared[name] = float(value)
        for task, number in enumerate(values):
            own[task][name] = float(number)
    return shared, own


def _base_name(model: nn.Module, base: str | Path | None, tokenizer: Any, folder: Path) -> str:
    if base is None:
        if not hasattr(model, "save_pretrained"):
            raise ValueError(
                f"export_peft: {type(model).__name__} has no save_pretrained to write the base "
                "with; save it yourself and say base=<folder>"
            )
        return str(folder / BASE)
    if tokenizer is not None:
        raise ValueError("export_peft: tokenizer is saved with the base, but base=... writes none")
    path = Path(base).resolve()
    if path.is_dir():
        if path.is_relative_to(folder):
            raise ValueError(f"export_peft: base {path} lies in folder {folder}; name another one")
        return str(path)
    if isinstance(base, Path) or not re.fullmatch(_HUB_NAME, base):
        raise ValueError(f"export_peft: base must be a folder or a hub name, got {str(base)!r}")
    return base


def _task_type_of(model: nn.Module) -> str | None:
    if not hasattr(model, "save_pretrained"):
        return None
    kind = type(model).__name__
    return next((task for end, task in _TASK_TYPES.items() if kind.endswith(end)), None)


def _tensor(
    key: str, task: int, layers: dict[str, TaskLayer], shared: Mapping[str, Tensor]
) -> Tensor:
    """The task's tensor of that name in PEFT: a factor, a head's parameter, or a shared one."""
    name = key.removeprefix(PREFIX)
    module, _, parameter = name.rpartition(".")
    owner, _, factor = module.rpartition(".")
    if factor in ("lora_A", "lora_B"):
        layer = layers[owner]
        assert isinstance(layer, LoRALayer)
        lora_A, lora_B = layer.factors()
        return (lora_A if factor == "lora_A" else lora_B).detach()[task]
    if module in layers:
        return getattr(layers[module].to_linear(task), parameter).detach()
    return shared[name]


def _as_json(settings: Any, model: nn.Module) -> str:
    values = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.to_dict().items()}
    if settings.task_type is None:  # how AutoPeftModel then finds the base's class
        kind = type(model)
        mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        values["auto_mapping"] = mapping
    return json.dumps(values, indent=2, sort_keys=True)


def _write_base(folder: Path, plain: Any, tokenizer: Any, card: str) -> None:
    plain.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / CARD).write_text(card, encoding="utf-8")


def _write_adapter(folder: Path, tensors: dict[str, Tensor], config: str, card: str) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    kept = {
        key: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config, encoding="utf-8")
    (folder / CARD).write_text(card, encoding="utf-8")
