"""What a checkpoint keeps of each task, apart from the rest, where processes have their own tasks.

Every process writes the tensors of its own tasks into a shard. A training on other processes takes
each of its tasks from the shard that has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metalora.adapters import task_parameters
from metalora.meta.stacked_steps import TASKS_WITH_STATE
from metalora.meta.training import Training

Tensors = dict[str, Tensor]
Shard = tuple[Sequence[int], Tensors]
"""The tasks of a shard, and their tensors, [number of these tasks, ...] each."""


def split(training: Training, tensors: Tensors) -> tuple[Tensors, Tensors]:
    """Tensors of a checkpoint → those that are the same in all processes, and those of tasks."""
    shared: Tensors = {}
    own: Tensors = {}
    for name, tensor in tensors.items():
        (own if _is_of_tasks(training, name) else shared)[name] = tensor
    return shared, own


def join(training: Training, shards: Sequence[Shard]) -> Tensors:
    """The tensors of this process's tasks, from shards of any number of processes.

    A shard of the same tasks is taken as it is. From others the optimiser's state is put together
    task by task.

    Raises:
        KeyError: if a task is in no shard.
    """
    tasks = training.distribution.tasks
    for held, tensors in shards:
        if list(held) == tasks and tasks:
            return dict(tensors)
    if not tasks:
        return _of_spare(training, shards)
    place = {task: (i, tensors) for held, tensors in shards for i, task in enumerate(held)}
    parts = [place[task] for task in tasks]
    names = [name for name in parts[0][1] if not name.startswith("optimizer.")]
    found = {name: torch.stack([tensors[name][i] for i, tensors in parts]) for name in names}
    for number in _numbers(training):
        states = [(i, beginning(f"optimizer.{number}.", tensors)) for i, tensors in parts]
        for key, value in _join_states(states).items():
            found[f"optimizer.{number}.{key}"] = value
    return found


def _join_states(states: Sequence[tuple[int, Tensors]]) -> Tensors:
    """The optimiser's state of a parameter, from those of each task's shard and its place there."""
    has = [bool(s) and bool(s.get(TASKS_WITH_STATE, torch.ones(i + 1))[i]) for i, s in states]
    if not any(has):
        return {}
    example = states[has.index(True)][1]
    found = {TASKS_WITH_STATE: torch.tensor(has)}
    for key in example.keys() - {TASKS_WITH_STATE}:
        values = [
            (s[key][i] if s[key].dim() else s[key]) if known else None
            for known, (i, s) in zip(has, states, strict=True)
        ]
        zeros = torch.zeros_like(next(value for value in values if value is not None))
        found[key] = torch.stack([zeros if value is None else value for value in values])
    return found


def _of_spare(training: Training, shards: Sequence[Shard]) -> Tensors:
    """Of a process without tasks: what its model has, which is never trained."""
    state = training.model.state_dict()
    names = [name for held, tensors in shards if held for name in tensors]
    kept = [name for name in dict.fromkeys(names) if not name.startswith("optimizer.")]
    return {name: state[_parameter(name)].detach().clone() for name in kept}


def _is_of_tasks(training: Training, name: str) -> bool:
    if name.startswith("optimizer."):
        return int(name.split(".")[1]) in _numbers(training)
    return _parameter(name) in _task_names(training)


def _parameter(name: str) -> str:
    """The name of the model's parameter that "model.NAME" or "callback.NUMBER.NAME" may be of."""
    return name.split(".", 2 if name.startswith("callback.") else 1)[-1]


def _task_names(training: Training) -> set[str]:
    own = {id(p) for p in task_parameters(training.model)}
    named = training.model.named_parameters(remove_duplicate=False)
    return {name for name, p in named if id(p) in own}


def _numbers(training: Training) -> list[int]:
    """The numbers that adapters and heads have in the optimiser."""
    own = {id(p) for p in training.step.own}
    groups = training.step.optimizer.param_groups
    parameters = [p for group in groups for p in group["params"]]
    return [number for number, p in enumerate(parameters) if id(p) in own]


def beginning(prefix: str, tensors: Tensors) -> Tensors:
    """The tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}
