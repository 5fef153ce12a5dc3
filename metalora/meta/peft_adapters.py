"""One adapter of the package peft per task, of which one is in use at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from metalora._optional import require
from metalora.adapters.fused_paths import close_fused_paths, reopen_fused_paths
from metalora.meta.peft_fit import check_first_call, insertion, kind_of
from metalora.nn import current_tasks
from metalora.nn.head import mean_over_tasks

_REFUSED = {
    "ADALORA": "allows one trainable adapter, whose ranks it must be told to update",
    "ADAPTION_PROMPT": "takes the layers of an adapter that is not in use out of the model",
    "MULTITASK_PROMPT_TUNING": "has tasks of its own, to be given with every call",
    "POLY": "has tasks of its own, to be given with every call",
    "SHADOW": "runs a second network beside the model",
    "XLORA": "mixes adapters that are trained already",
}
_DETACHED = ("FROD", "HRA", "SHIRA")
_CHANGED = ("_modules", "_forward_hooks", "_forward_pre_hooks")  # by peft, of the plain model


@contextmanager
def peft_adapters(
    function: str, model: nn.Module, peft_config: Any, num_tasks: int, *, train_shared: bool
) -> Iterator[nn.Module]:
    """The ``peft.PeftModel`` around ``model`` with adapters "task0", "task1", ..., all trainable.

    Before each call the adapter of the task in `metalora.tasks` is set. On leaving, ``model``
    consists of its own modules again, also after an error.

    Args:
        function: what error messages call the caller.
        model: a plain model.
        peft_config: a ``peft.PeftConfig``.
        num_tasks: number of tasks T.
        train_shared: whether the weights of ``model`` that require a gradient still do.

    Raises:
        ImportError: if peft is not installed, or not in a supported version.
        TypeError: if ``peft_config`` is no configuration.
        ValueError: if the method cannot have an adapter per task, or does not fit the model.
        RuntimeError: if peft fails to set the method up; from the first call of the adapted model,
            if the method fails there and the plain model does not.
    """
    peft = require("peft", function)
    _check(function, peft, model, peft_config, train_shared)
    before = [(m, name, dict(getattr(m, name))) for m in model.modules() for name in _CHANGED]
    attributes = set(vars(model))
    needed = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with insertion(function, peft, model, peft_config):
            adapted, own = _insert(function, peft, model, peft_config, num_tasks)
        for parameter, flag in needed:
            parameter.requires_grad_(flag and train_shared)
        for parameter in own:
            parameter.requires_grad_()
        close_fused_paths(model, peft.tuners.tuners_utils.BaseTunerLayer)
        adapted.register_forward_pre_hook(lambda *_: _use_task(function, adapted, num_tasks))
        check_first_call(function, peft, adapted, model, peft_config)
        yield adapted
    finally:
        for module, name, members in before:
            getattr(module, name).clear()
            getattr(module, name).update(members)
        reopen_fused_paths(model)
        for name in set(vars(model)) - attributes:
            delattr(model, name)
        for parameter, flag in needed:
            parameter.requires_grad_(flag)


def adapter_state_dicts(adapted: nn.Module, num_tasks: int) -> list[dict[str, Tensor]]:
    """Per task what ``peft.get_peft_model_state_dict`` gives, copied."""
    import peft

    states = [
        peft.get_peft_model_state_dict(
            adapted, adapter_name=_name(task), save_embedding_layers=False
        )
        for task in range(num_tasks)
    ]
    return [{name: t.detach().clone() for name, t in state.items()} for state in states]


def average_heads(adapted: nn.Module) -> None:
    """Gives each module that exists once per task (``modules_to_save``) the mean of the tasks'."""
    from peft.utils import ModulesToSaveWrapper

    for module in adapted.modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        of_tasks = [head.state_dict() for head in module.modules_to_save.values()]
        for name, shared in module.original_module.state_dict().items():
            if shared.is_floating_point():
                shared.copy_(mean_over_tasks(torch.stack([state[name] for state in of_tasks])))


def settings_of(peft_config: Any) -> dict[str, Any]:
    """The fields of a ``peft.PeftConfig``, as JSON can hold them."""
    text = json.dumps(
        peft_config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v)
    )
    return dict(json.loads(text))


def _name(task: int) -> str:
    return f"task{task}"


def _insert(
    function: str, peft: ModuleType, model: nn.Module, peft_config: Any, num_tasks: int
) -> tuple[Any, list[nn.Parameter]]:
    """The PeftModel, and the parameters that its adapters train."""
    start = [(p, p.detach().clone()) for p in model.parameters()]
    seen = {id(p) for p, _ in start}
    own: list[nn.Parameter] = []
    adapted: Any = None
    for task in range(num_tasks):
        config = copy.deepcopy(peft_config)  # peft writes into it
        config.inference_mode = False
        if adapted is None:
            adapted = peft.get_peft_model(model, config, adapter_name=_name(task))
        else:
            adapted.add_adapter(_name(task), config)
        adapted.set_adapter(_name(task))
        new = [p for p in adapted.parameters() if id(p) not in seen]
        seen.update(map(id, new))
        own += [p for p in new if p.requires_grad]
    if any(not torch.equal(parameter, value) for parameter, value in start):
        for parameter, value in start:
            parameter.data.copy_(value)
        raise ValueError(
            f"{function}: {kind_of(peft_config)} starts by changing the weights that all tasks "
            "share; choose another initialisation, such as init_lora_weights=True"
        )
    return adapted, own


def _use_task(function: str, adapted: Any, num_tasks: int) -> None:
    batch = current_tasks()
    if batch is None:
        if num_tasks == 1:
            return
        raise ValueError(
            f"{function}: which task do the samples belong to? Call the model inside "
            f"`with metalora.tasks(task_ids):` ({num_tasks} tasks)"
        )
    present = batch.task_ptr(num_tasks, 1).diff().nonzero()[:, 0].tolist()
    if len(present) > 1:
        raise ValueError(
            f"{function}: with peft's own layers the model runs one task at a time, got samples of "
            f"tasks {present} in one call; iterate over metalora.meta.by_task(loader)"
        )
    if present and adapted.active_adapter != _name(present[0]):
        adapted.set_adapter(_name(present[0]))


def _check(
    function: str, peft: ModuleType, model: nn.Module, peft_config: Any, train_shared: bool
) -> None:
    if not isinstance(peft_config, peft.PeftConfig):
        raise TypeError(
            f"{function}: peft_config must be a configuration of peft, such as peft.LoraConfig, "
            f"got {type(peft_config).__name__}"
        )
    layer = peft.tuners.tuners_utils.BaseTunerLayer
    if any(isinstance(module, (layer, peft.PeftModel)) for module in model.modules()):
        raise ValueError(
            f"{function}: the model has adapters of peft already; pass what its unload() returns"
        )
    kind = kind_of(peft_config)
    if kind in _REFUSED:
        raise ValueError(f"{function}: {kind} {_REFUSED[kind]}; choose another method")
    if train_shared and kind in _DETACHED:
        raise ValueError(
            f"{function}: {kind} computes with a detached copy of the weights, so the shared "
            "weights would not be trained; choose another method"
        )
    if peft_config.is_prompt_learning and peft_config.task_type is None:
        raise ValueError(f"{function}: {kind} needs a task_type, such as task_type='SEQ_CLS'")
