"""The parts of an adapted model: the shared weights, and what each task has of its own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from metalora._checks import did_you_mean
from metalora.nn import TaskLayer
from metalora.nn.head import mean_over_tasks
from metalora.nn.lora_layer import LoRALayer

_FROZEN = "_metalora_frozen"  # of a module: names of the parameters that `freeze_base` froze


def adapted_layers(model: nn.Module) -> dict[str, TaskLayer]:
    """The layers of ``model`` that hold something per task, by name; each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TaskLayer)}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what ``torch.compile`` or DistributedDataParallel made of it.

    Names of those have a prefix, which nobody else knows. One may be inside the other.
    """
    parallel = nn.DataParallel, nn.parallel.DistributedDataParallel
    inner = model.module if isinstance(model, parallel) else getattr(model, "_orig_mod", None)
    return model if inner is None else unwrapped(inner)


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The shared weights, under the names of the plain model, which loads them with strict=True.

    Adapters are left out; a head is the mean of the tasks' heads. The tensors are those of the
    model and no copies, as in ``state_dict``, the means excepted.
    """
    model = unwrapped(model)
    state: dict[str, Tensor] = dict(model.state_dict())
    for prefix, layer in model.named_modules(remove_duplicate=False):
        if not isinstance(layer, TaskLayer):
            continue
        for name, parameter in layer.own_task_parameters().items():
            key = _joined(prefix, name)
            if isinstance(layer, LoRALayer):
                del state[key]
            else:
                state[key] = mean_over_tasks(parameter.detach())
    return state


def load_base_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what `base_state_dict` returned, or the plain model's ``state_dict``.

    Adapters stay as they are; a head is given to every task.

    Raises:
        ValueError: if ``model`` is not adapted, or names or shapes differ; nothing is changed then.
    """
    name, model = "load_base_state_dict", unwrapped(model)
    mine = base_state_dict(check_adapted(name, model))
    for key in state:
        if key not in mine:
            raise ValueError(f"{name}: the plain model has no {key!r}{did_you_mean(key, mine)}")
    whole = dict(model.state_dict())
    for key, tensor in mine.items():
        if key not in state:
            raise ValueError(f"{name}: {key!r} is missing from state")
        given = state[key]
        if isinstance(tensor, Tensor) and isinstance(given, Tensor):  # and no extra state
            if given.shape != tensor.shape:
                wanted, got = list(tensor.shape), list(given.shape)
                raise ValueError(f"{name}: {key!r} must be {wanted}, got {got}")
            given = given.expand_as(whole[key])
        whole[key] = given
    model.load_state_dict(whole)


def task_state_dict(model: nn.Module, task: int) -> dict[str, Tensor]:
    """What task ``task`` has of its own, copied: per layer lora_A [r, in] and lora_B [out, r] (or
    lora_U [d, k]), per head weight [out, in] and bias [out].

    Raises:
        ValueError: if ``model`` is not adapted or has no such task.
    """
    return {
        name: stacked.detach()[task].clone()
        for name, stacked in _stacked("task_state_dict", model, task).items()
    }


def load_task_state_dict(model: nn.Module, task: int, state: Mapping[str, Tensor]) -> None:
    """Gives task ``task`` what `task_state_dict` returned, here or for an equal model.

    Raises:
        ValueError: if names or shapes differ; nothing is changed then.
    """
    stacked = _stacked("load_task_state_dict", model, task)
    for name in state:
        if name not in stacked:
            hint = did_you_mean(name, stacked)
            raise ValueError(f"load_task_state_dict: the model has no {name!r}{hint}")
    for name, parameter in stacked.items():
        if name not in state:
            raise ValueError(f"load_task_state_dict: {name!r} is missing from state")
        if state[name].shape != parameter.shape[1:]:
            wanted, got = list(parameter.shape[1:]), list(state[name].shape)
            raise ValueError(f"load_task_state_dict: {name!r} must be {wanted}, got {got}")
    with torch.no_grad():
        for name, parameter in stacked.items():
            parameter[task].copy_(state[name])


def task_parameters(model: nn.Module) -> list[nn.Parameter]:
    """All parameters with one slice per task, [T, ...] each."""
    layers = adapted_layers(model).values()
    return [p for layer in layers for p in layer.own_task_parameters().values()]


def freeze_base(model: nn.Module) -> None:
    """Leaves only adapters and heads trainable, as in fine-tuning (paper, eq. 2-4).

    `metalora.unload` and `metalora.merge_and_unload` make trainable again what this froze.

    Raises:
        ValueError: if ``model`` is not adapted.
    """
    own = {id(parameter) for parameter in task_parameters(check_adapted("freeze_base", model))}
    frozen = model.__dict__.setdefault(_FROZEN, [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            frozen.append(name)
        parameter.requires_grad_(id(parameter) in own)


def unfreeze_base(model: nn.Module) -> None:
    """Makes trainable again what `freeze_base` froze in ``model`` or in a part of it."""
    for module in model.modules():
        if frozen := set(module.__dict__.pop(_FROZEN, ())):
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or name in frozen)


def nothing_shared_is_trained(model: nn.Module) -> bool:
    """Whether an adapted model's shared weights are all frozen, and not by `freeze_base`."""
    own = {id(parameter) for parameter in task_parameters(model)}
    shared = [p for p in model.parameters() if id(p) not in own]
    meant = any(_FROZEN in module.__dict__ for module in model.modules())
    return bool(shared) and not meant and not any(p.requires_grad for p in shared)


def reset_adapters(model: nn.Module) -> None:
    """Draws all adapters and heads afresh, from torch's generator.

    Raises:
        ValueError: if ``model`` is not adapted.
    """
    for layer in adapted_layers(check_adapted("reset_adapters", model)).values():
        layer.redraw_tasks()


def _stacked(function: str, model: nn.Module, task: int) -> dict[str, nn.Parameter]:
    found = {}
    for prefix, layer in adapted_layers(check_adapted(function, unwrapped(model))).items():
        layer.check_task(task)
        for name, parameter in layer.own_task_parameters().items():
            found[_joined(prefix, name)] = parameter
    return found


def _joined(prefix: str, name: str) -> str:
    """The name in ``state_dict`` of a layer's parameter; the model itself has the prefix ""."""
    return f"{prefix}.{name}" if prefix else name


def check_plain(function: str, model: nn.Module) -> None:
    """Raises ValueError if ``model`` has adapters or heads of tasks."""
    if adapted_layers(model):
        raise ValueError(
            f"{function}: the model has adapters already; metalora.unload(model) takes them out"
        )


def check_adapted(function: str, model: nn.Module) -> nn.Module:
    """Returns ``model`` if it has adapters or heads of tasks, else raises ValueError."""
    if not adapted_layers(model):
        raise ValueError(f"{function}: the model has no adapters; metalora.adapt puts them in")
    return model
