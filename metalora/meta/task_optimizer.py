"""An optimiser that steps the tasks of a batch and leaves the others alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from metalora._checks import check_module, check_nonnegative
from metalora._warn import warn_user
from metalora.adapters import adapted_layers
from metalora.adapters.state import nothing_shared_is_trained
from metalora.meta.identity import qualified_name
from metalora.meta.optimizer import NAMED, can_fuse, warn_of_short
from metalora.meta.stacked_steps import TASKS_WITH_STATE, StackedState, step_tasks
from metalora.nn import SeenTasks

# Fewer tasks than these are stepped slice by slice if one is absent, which is faster then: AdamW on
# a CPU core and 20 layers of 256 took 2.1 ms with 2 of 4 tasks present, 3.0 ms from stacked values.
STACKED_FROM = 10
# These step each number by itself, so that a stacked parameter may be stepped whole.
_ELEMENTWISE = (
    optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.RMSprop,
    optim.Adagrad, optim.Adadelta, optim.Rprop, optim.ASGD,
)  # fmt: skip


class TaskOptimizer(Optimizer):
    """Any optimiser, for an adapted model: steps every task as if it had an optimiser of its own.

    Adam and its like move a parameter whose gradient is zero too, by its momentum and its weight
    decay, and count the step. In an adapted model all tasks share one parameter, [T, ...], so they
    would move the adapters of tasks that have no samples in the batch. Here such a task keeps its
    adapters and heads, their moments and their step counts: each task has parameters of its own
    (paper, eq. 5 and 6).

    Example:
        ``optimizer = metalora.TaskOptimizer(model, torch.optim.AdamW, lr=5e-5)``

    It is used as any optimiser of torch. ``param_groups`` hold the model's own parameters, the
    shared ones first (no group if all are frozen), then the adapters and heads: learning-rate
    schedules, ``clip_grad_norm_``, ``GradScaler``, gradient accumulation and ``accelerate`` work as
    usual. ``state`` and ``state_dict`` have one entry per parameter. Once the tasks have not all
    been stepped alike, an entry holds each value stacked, [T, ...], and tells which tasks have one.
    ``state`` is a copy; `load_state_dict` changes it.

    A task is present in a layer if it has samples in a pass whose gradients were added since they
    were last set to None, or to zero by this optimiser's `zero_grad`; in a layer that no pass has
    reached, none is. Passes under ``torch.no_grad()``, as evaluations should be, do not count; one
    with grad enabled but no ``backward()`` does, if the backward of another follows before the next
    step. Nothing waits for a GPU, except that a model with heads alone, with ids on the GPU and no
    counts, waits once per batch. With several processes in torch.distributed, whose gradients
    DistributedDataParallel averages, a task is present if it is in any process; each step then
    exchanges which are.

    Args:
        model: an adapted model; the parameters that require a gradient now are trained.
        optimizer: a class, such as ``torch.optim.AdamW``.
        adapter_lr: learning rate of adapters and heads; None means that of the shared parameters.
        adapter_weight_decay: their weight decay; None means that of the shared parameters.
        task_parallel: whether each process has tasks of its own, see `metalora.meta.Distribution`:
            then no other process is asked for tasks.
        options: what ``optimizer`` takes beside the parameters, such as ``lr``. SGD, Adam and
            AdamW are fused unless ``fused`` or ``foreach`` is given, and step the tasks present of
            10 or more from stacked values, which takes little more than a step of all; others step
            slices.
            Until a task is absent SGD with momentum is not fused: torch can fuse it only if all
            begin in the same step.

    Raises:
        TypeError: if ``optimizer`` is no class of optimisers, or does not take ``options``.
        ValueError: if the model has no adapters or nothing to train, a number is outside its range
            or not known to ``optimizer``, or ``optimizer`` needs several passes per step, as LBFGS.
    """

    steps: int
    """How many steps this object has taken."""
    unreached: set[Tensor]
    """The trainable adapters and heads that had no gradient in any of them."""
    exchanges: bool
    """Whether a step asks all processes of torch.distributed which tasks are present."""
    _inner: Optimizer | None = None  # until it is made

    def __init__(
        self,
        model: nn.Module,
        optimizer: type[Optimizer],
        *,
        adapter_lr: float | None = None,
        adapter_weight_decay: float | None = None,
        task_parallel: bool = False,
        **options: Any,
    ) -> None:
        _check_class(optimizer, options)
        self.exchanges = not task_parallel
        self._seen = _watch(model, optimizer, task_parallel)
        self._recorders = list(dict.fromkeys(chain.from_iterable(self._seen.values())))
        trainable = [p for p in model.parameters() if p.requires_grad]
        own = [p for p in trainable if p in self._seen]
        shared = [p for p in trainable if p not in self._seen]
        if not trainable:
            raise ValueError("TaskOptimizer: the model has no trainable parameters; it is frozen")
        if nothing_shared_is_trained(model):
            warn_user(
                "TaskOptimizer: all weights that tasks share are frozen, as PEFT leaves them, so "
                "adapters alone are trained; call model.requires_grad_(True), or "
                "metalora.freeze_base(model) if that is meant"
            )
        warn_of_short("TaskOptimizer", trainable)
        self._fused = optimizer in NAMED.values() and _fuses(options) and can_fuse(trainable)
        if optimizer in NAMED.values():
            options = {"fused": self._fused and not options.get("momentum"), **options}
        self._whole = optimizer in _ELEMENTWISE
        # The parameters that `step_tasks` steps, as their tasks are apart and it can.
        self._stacked: dict[Tensor, StackedState] = {}
        # What the wrapped optimiser steps for each parameter [T, ...]: itself, or the slices of its
        # tasks; nothing of those above.
        self._leaves: dict[Tensor, list[Tensor]] = {
            p: [p] if self._whole else _slices(p) for p in own
        }
        self.steps = 0
        self.unreached = set(own)
        groups: list[dict[str, Any]] = [{"params": part} for part in (shared, own) if part]
        inner = optimizer([{"params": self._flat(group)} for group in groups], **options)
        for name, value in (("lr", adapter_lr), ("weight_decay", adapter_weight_decay)):
            if value is not None:
                _check_settable(name, optimizer, inner, own)
                groups[-1][name] = check_nonnegative("TaskOptimizer", f"adapter_{name}", value)
        super().__init__(groups, inner.defaults)
        self._inner = inner

    @property
    def inner(self) -> Optimizer:
        """The wrapped optimiser, over the model's parameters or the slices of their tasks."""
        assert self._inner is not None
        return self._inner

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Steps the shared parameters, and the adapters and heads of the tasks present.

        Args:
            closure: makes new gradients and returns the loss; called once.

        Returns:
            The loss, if there is a closure.

        Raises:
            RuntimeError: if adapters have gradients but it is not known of which tasks, or the
                adapters in ``param_groups`` are not those of the model that this was made for.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        slices, stacked = self._give_gradients()
        self._give_groups()
        # What a GradScaler sets on fused optimisers, whose kernels unscale, and skip the step.
        scaling = {k: getattr(self, k) for k in ("grad_scale", "found_inf") if hasattr(self, k)}
        vars(self.inner).update(scaling)
        self.inner.step()
        for name in scaling:
            delattr(self.inner, name)
        for group in self.param_groups:
            tasks = {self._stacked[p]: stacked[p] for p in group["params"] if p in stacked}
            if tasks:
                step_tasks(type(self.inner), group, tasks, **scaling)
        for leaf in slices:
            leaf.grad = None  # shares the memory of a gradient that zero_grad frees
        self.forget_passes()
        self.steps += 1
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets all gradients; no task is present then."""
        super().zero_grad(set_to_none)
        for seen in self._recorders:
            seen.zero_grad(set_to_none)

    def forget_passes(self) -> None:
        """Says that no forward pass so far will have a backward pass, as after an evaluation."""
        for seen in self._recorders:
            seen.step()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Gives shared parameters settings of their own, in a group behind the others.

        Those that are trained already leave their group, with what the optimiser keeps of them.
        Schedules, and `load_state_dict`, come after the groups are made.

        Example:
            No weight decay for the shared biases and norms, which have one dimension::

                flat = [p for p in model.parameters() if p.requires_grad and p.dim() == 1]
                optimizer.add_param_group({"params": flat, "weight_decay": 0.0})

        Raises:
            ValueError: if they are adapters or heads.
        """
        if self._inner is None:  # called by torch's constructor
            super().add_param_group(param_group)
            return
        given = param_group["params"]
        added = [given] if isinstance(given, Tensor) else list(given)
        if any(p in self._seen for p in added):
            raise ValueError(
                "TaskOptimizer.add_param_group: adapters and heads cannot be added; their settings "
                "are adapter_lr and adapter_weight_decay, and for any that were frozen make a new "
                "TaskOptimizer once they require a gradient"
            )
        before = [group["params"] for group in self.param_groups]
        moved = {id(p) for p in added}
        for group in self.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in moved]
        try:
            super().add_param_group({**param_group, "params": added})
        except Exception:
            for group, parameters in zip(self.param_groups, before, strict=True):
                group["params"] = parameters
            raise
        *others, last = self.param_groups
        for group, inner in zip(others, self.inner.param_groups, strict=True):
            inner["params"] = self._flat(group)
        self.inner.add_param_group(dict(last))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return getattr(self.inner, "_step_supports_amp_scaling", False)

    @property
    def state(self) -> defaultdict[Tensor, dict[str, Any]]:
        """What the wrapped optimiser keeps of each parameter; a copy where tasks are apart."""
        leaves_of_tasks = {leaf for leaves in self._leaves.values() for leaf in leaves}
        found: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        found.update({p: s for p, s in self.inner.state.items() if p not in leaves_of_tasks})
        for parameter, leaves in self._leaves.items():
            states = [self.inner.state.get(leaf, {}) for leaf in leaves]
            if any(states):
                found[parameter] = states[0] if leaves[0] is parameter else _stack(states)
        found.update({p: dict(s.values) for p, s in self._stacked.items() if s.values})
        return found

    @state.setter
    def state(self, state: Any) -> None:
        """Of no effect: torch's constructor sets an empty one."""

    def state_dict(self) -> dict[str, Any]:
        """The state of any optimiser and, under "wraps", the name of the wrapped class."""
        return {**super().state_dict(), "wraps": qualified_name(type(self.inner))}

    def __getstate__(self) -> Any:
        """Refuses ``copy.deepcopy`` and ``pickle``: this model's layers tell the tasks present.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            "TaskOptimizer: it cannot be copied or pickled, as it belongs to its model's layers; "
            "make a new TaskOptimizer for the copied model and load its state_dict"
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restores what `state_dict` returned, here or for an equal model.

        Raises:
            ValueError: if it is of another model or optimiser; nothing is changed then.
        """
        saved = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            saved = before(self, saved) or saved
        saved = _numbered(saved)
        self._check_fits(saved)
        self._stacked.clear()
        for number, parameter in enumerate(self._parameters()):
            if parameter in self._leaves:
                values = saved["state"].get(number, {})
                apart = not self._whole or TASKS_WITH_STATE in values
                self._leaves[parameter] = [parameter]
                if apart and self._can_stack(parameter):
                    self._keep_stacked(parameter, deepcopy(values))
                elif apart:
                    self._leaves[parameter] = _slices(parameter)
        for group, new in zip(self.param_groups, deepcopy(saved["param_groups"]), strict=True):
            group.update({k: v for k, v in new.items() if k != "params"})
        self.inner.state.clear()
        self._give_groups()
        # The class itself decides how its state is taken: numbered as its own parameters are.
        inner_state: dict[int, dict[str, Any]] = {}
        first = 0  # number of the first leaf
        for number, parameter in enumerate(self._parameters()):
            values = saved["state"].get(number, {})
            if parameter in self._stacked:
                continue
            if TASKS_WITH_STATE in values:
                for task, has_state in enumerate(values[TASKS_WITH_STATE].tolist()):
                    if has_state:
                        inner_state[first + task] = _of_task(values, task)
            elif values:
                inner_state[first] = values
            first += len(self._leaves.get(parameter, [parameter]))
        self.inner.load_state_dict({**self.inner.state_dict(), "state": inner_state})
        self._keep_scalars(inner_state)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _keep_scalars(self, saved: dict[int, dict[str, Any]]) -> None:
        """Restores scalars, such as NAdam's products, which torch rounds to another dtype."""
        leaves = [leaf for group in self.inner.param_groups for leaf in group["params"]]
        for number, values in saved.items():
            state = self.inner.state[leaves[number]]
            for key, value in values.items():
                if key != "step" and isinstance(value, Tensor) and value.dim() == 0:
                    state[key] = value.to(state[key].device, copy=True)

    def _check_fits(self, saved: dict[str, Any]) -> None:
        where = "TaskOptimizer.load_state_dict: the state"
        if not {"state", "param_groups"} <= saved.keys():
            raise ValueError(f"{where} must hold 'state' and 'param_groups', got {sorted(saved)}")
        name = qualified_name(type(self.inner))
        if saved.get("wraps", name) != name:
            raise ValueError(
                f"{where} must be of {name}, as this optimiser is, got {saved['wraps']}"
            )
        sizes = [len(group["params"]) for group in self.param_groups]
        got = [len(group["params"]) for group in saved["param_groups"]]
        if sizes != got:
            raise ValueError(
                f"{where} must be of an equal model, with groups of {sizes} parameters, got {got}"
            )
        parameters = self._parameters()
        for number, values in saved["state"].items():
            if number not in range(len(parameters)):
                raise ValueError(
                    f"{where} must be of parameters 0..{len(parameters) - 1}, got number {number}"
                )
            self._check_state(f"{where} of parameter {number}", parameters[number], values)

    def _check_state(self, where: str, parameter: Tensor, values: dict[str, Any]) -> None:
        shape = tuple(parameter.shape)
        own, apart = parameter in self._leaves, TASKS_WITH_STATE in values
        if apart and (not own or tuple(values[TASKS_WITH_STATE].shape) != shape[:1]):
            raise ValueError(f"{where} must be of an equal model, got that of other tasks")
        if own and not apart and not self._whole:
            raise ValueError(f"{where} must hold {TASKS_WITH_STATE!r}, got {sorted(values)}")
        if not self._whole:
            return  # only the class knows what shapes it keeps
        for key, value in values.items():
            allowed = [(), shape, shape[:1]] if apart else [(), shape]
            if isinstance(value, Tensor) and tuple(value.shape) not in allowed:
                raise ValueError(
                    f"{where} must be of an equal model, with {key!r} {list(shape)}, "
                    f"got {list(value.shape)}"
                )

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _flat(self, group: dict[str, Any]) -> list[Tensor]:
        """What the wrapped optimiser steps for the parameters of a group."""
        return [leaf for p in group["params"] for leaf in self._leaves.get(p, [p])]

    def _give_groups(self) -> None:
        """Hands on what schedules set in ``param_groups``."""
        for group, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({**group, "params": self._flat(group)})
            if isinstance(self.inner, optim.SGD) and group["momentum"]:  # of a schedule
                inner["fused"] = False

    def _give_gradients(self) -> tuple[list[Tensor], dict[Tensor, list[int]]]:
        """Gives the slices of the tasks present their gradients.

        Returns:
            All slices; and of the stacked parameters that have gradients, the tasks present.
        """
        if sum(p in self._leaves for p in self._parameters()) != len(self._leaves):
            raise RuntimeError(
                "TaskOptimizer.step: param_groups hold other adapters than the model's; what "
                "replaces parameters, such as FSDP, is not supported"
            )
        device = next(iter(self._seen)).device
        present = _present(self._recorders, device, alone=not self.exchanges)
        slices: list[Tensor] = []
        stacked: dict[Tensor, list[int]] = {}
        for parameter in self._leaves:
            if parameter.grad is not None:
                tasks = self._tasks(parameter, present)
                if tasks and self.unreached:
                    self.unreached.discard(parameter)
                if self._is_whole(parameter) and len(tasks) < len(parameter):
                    self._take_apart(parameter)
                if parameter in self._stacked:
                    stacked[parameter] = list(tasks)
            if parameter in self._stacked or self._is_whole(parameter):
                continue
            leaves = self._leaves[parameter]
            slices += leaves
            if leaves[0].data_ptr() != parameter.data_ptr():  # as after model.to(device)
                for leaf, part in zip(leaves, parameter.detach().unbind(), strict=True):
                    leaf.data = part
            if parameter.grad is not None:
                for task, (leaf, grad) in enumerate(zip(leaves, parameter.grad, strict=True)):
                    leaf.grad = grad if task in tasks else None
        return slices, stacked

    def _is_whole(self, parameter: Tensor) -> bool:
        """Whether the wrapped optimiser steps it as one."""
        leaves = self._leaves[parameter]
        return bool(leaves) and leaves[0] is parameter

    def _tasks(
        self, parameter: Tensor, present: Mapping[SeenTasks, frozenset[int] | None]
    ) -> frozenset[int]:
        """The tasks that a parameter's gradient is of."""
        recorders = self._seen[parameter]
        if not recorders:  # there is but one task
            return frozenset(range(len(parameter)))
        known = [tasks for seen in recorders if (tasks := present[seen]) is not None]
        if not known and all(group["lr"] == 0 for group in self.param_groups):
            return frozenset(range(len(parameter)))  # torch.distributed.checkpoint makes a state
        if not known:
            raise RuntimeError(
                "TaskOptimizer.step: adapters have gradients, but not from a backward pass since "
                "zero_grad, so it is unknown which tasks they are of; call zero_grad, backward and "
                "step once each, in this order, and set no gradients by hand"
            )
        return frozenset().union(*known)

    def _take_apart(self, parameter: Tensor) -> None:
        """From now on steps a parameter task by task, each with its part of the state."""
        state = self.inner.state.pop(parameter, {})
        if self._can_stack(parameter):
            self._keep_stacked(parameter, state)
            return
        slices = self._leaves[parameter] = _slices(parameter)
        for task, leaf in enumerate(slices):
            if state:
                self.inner.state[leaf] = {
                    key: _part(value, task, parameter.shape) for key, value in state.items()
                }

    def _can_stack(self, parameter: Tensor) -> bool:
        return self._fused and parameter.is_contiguous() and len(parameter) >= STACKED_FROM

    def _keep_stacked(self, parameter: Tensor, state: dict[str, Any]) -> None:
        self._leaves[parameter], self._stacked[parameter] = [], StackedState(parameter, state)


def _numbered(saved: dict[str, Any]) -> dict[str, Any]:
    """A state whose parameters are numbered; torch.distributed.checkpoint gives them by name."""
    if not {"state", "param_groups"} <= saved.keys():
        return saved
    keys = [key for group in saved["param_groups"] for key in group["params"]]
    numbers = {key: number for number, key in enumerate(keys)}
    state = {numbers.get(key, key): values for key, values in saved["state"].items()}
    return {**saved, "state": state}


def _named(optimizer: Any) -> str:
    """A class by its name, anything else by that of its class."""
    is_class = isinstance(optimizer, type)
    return optimizer.__name__ if is_class else f"an object of {type(optimizer).__name__}"


def _check_class(optimizer: Any, options: dict[str, Any]) -> None:
    is_class = isinstance(optimizer, type) and issubclass(optimizer, Optimizer)
    if not is_class or issubclass(optimizer, TaskOptimizer):
        raise TypeError(
            "TaskOptimizer: optimizer must be a class of optimisers, such as torch.optim.AdamW, "
            f"got {_named(optimizer)}"
        )
    if issubclass(optimizer, optim.SGD) and options.get("fused") and options.get("momentum"):
        raise ValueError(
            "TaskOptimizer: SGD with momentum cannot be fused: torch would have all tasks begin in "
            "the same step; pass fused=False"
        )
    if issubclass(optimizer, optim.LBFGS):
        raise ValueError(
            "TaskOptimizer: LBFGS takes several passes per step, of which each could have other "
            "tasks; use one that takes a single pass, such as torch.optim.AdamW"
        )


def _fuses(options: dict[str, Any]) -> bool:
    """Whether SGD, Adam or AdamW is fused with these options, if they do not say so themselves."""
    if "foreach" in options or options.get("differentiable") or options.get("capturable"):
        return False
    return options.get("fused", True) and not isinstance(options.get("lr"), Tensor)


def _check_settable(name: str, optimizer: type, inner: Optimizer, own: list[nn.Parameter]) -> None:
    if name not in inner.defaults:
        raise ValueError(
            f"TaskOptimizer: adapter_{name} cannot be set, as {optimizer.__name__} has no {name}"
        )
    if not own:
        raise ValueError(
            f"TaskOptimizer: adapter_{name} is for adapters and heads, but all are frozen"
        )


def _watch(model: nn.Module, optimizer: type, task_parallel: bool) -> dict[Tensor, list[SeenTasks]]:
    """Per parameter with one slice per task, its recorders; none where there is only one task.

    Task parallel, the only one here may be absent, while samples of others are in other processes.
    """
    layers = list(adapted_layers(check_module("TaskOptimizer", model)).values())
    if not layers:
        raise ValueError(
            "TaskOptimizer: the model has no adapters; metalora.adapt puts them in, and for a "
            f"plain model {optimizer.__name__} itself does"
        )
    found: dict[Tensor, list[SeenTasks]] = {}
    for layer in layers:
        for parameter in layer.own_task_parameters().values():
            if hasattr(parameter, "device_mesh"):
                raise ValueError(
                    "TaskOptimizer: adapters and heads must be plain parameters, got a DTensor; "
                    "what shards them, such as FSDP2, is not supported"
                )
            recorders = [layer.watch_tasks()] if layer.num_tasks > 1 or task_parallel else []
            found.setdefault(parameter, []).extend(recorders)
    return found


def _present(
    recorders: list[SeenTasks], device: torch.device, *, alone: bool
) -> dict[SeenTasks, frozenset[int] | None]:
    """The tasks each recorder has seen, here or in any process whose gradients were averaged."""
    found = {seen: seen.tasks() for seen in recorders}
    if alone or not (recorders and dist.is_available() and dist.is_initialized()):
        return found
    if dist.get_world_size() == 1:
        return found
    flags = []  # per recorder whether there was anything, and of which tasks
    for seen, tasks in found.items():
        flags += [tasks is not None, *(task in (tasks or ()) for task in range(seen.num_tasks))]
    shared = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    rest = iter(shared.tolist())
    for seen in recorders:
        anything, *has = (next(rest) for _ in range(seen.num_tasks + 1))
        found[seen] = frozenset(t for t, is_in in enumerate(has) if is_in) if anything else None
    return found


def _slices(parameter: Tensor) -> list[Tensor]:
    """[T, ...] → a leaf for each task, [...], in the parameter's memory."""
    return [part.requires_grad_() for part in parameter.detach().unbind()]


def _stack(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The tasks' states as one, each value stacked along dimension 0 or in a list."""
    known = next(state for state in states if state)
    stacked = {key: _stack_values([state.get(key) for state in states]) for key in known}
    return {**stacked, TASKS_WITH_STATE: torch.tensor([bool(state) for state in states])}


def _stack_values(values: list[Any]) -> Tensor | list[Any]:
    some = next(value for value in values if value is not None)
    if not isinstance(some, Tensor):
        return values
    return torch.stack([torch.zeros_like(some) if value is None else value for value in values])


def _of_task(values: dict[str, Any], task: int) -> dict[str, Any]:
    """What `_stack` made of a task's state, without sharing memory."""
    own = {key: value[task] for key, value in values.items() if key != TASKS_WITH_STATE}
    return {key: v.clone() if isinstance(v, Tensor) else v for key, v in own.items()}


def _part(value: Any, task: int, shape: torch.Size) -> Any:
    """A task's part of one value of a whole parameter's state, without sharing memory."""
    if not isinstance(value, Tensor):
        return deepcopy(value)
    return (value[task] if value.shape == shape else value).clone()
