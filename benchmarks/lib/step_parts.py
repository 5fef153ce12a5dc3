"""Where the time of a training step goes: the profiler's operators, sorted into a few parts.

Every event counts for the time that none of its children takes, so the parts add up to the step.
What an event is part of follows from its name and from those of the events around it; one of the
backward pass belongs to the forward operator whose gradient it takes. Whatever has no name of its
own, such as Python between two operators, is "other".
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.profiler import ProfilerActivity, profile, record_function

STEP, DROPOUT = "training step", "nn.Dropout"
_NODE = "autograd::engine::evaluate_function"
# The first row that fits says the part. It looks at the event's own name, or at any name around it:
# all of attention is attention, its products and its dropout too, while the large products of a
# LoRA layer are told from the rest of it.
_ANY, _OWN = "any", "own"
_RULES = tuple(
    (part, whose, re.compile(pattern, re.IGNORECASE))
    for part, whose, pattern in (
        ("optimiser", _ANY, r"^Optimizer\.|_fused_(adam|sgd)"),
        ("attention", _ANY, r"attention"),
        ("normalisation", _ANY, r"norm"),
        ("activation", _ANY, r"gelu|relu|tanh|sigmoid"),
        ("dropout", _ANY, rf"^{re.escape(DROPOUT)}$|^aten::.*(dropout|bernoulli)"),
        ("products", _OWN, r"^aten::(addmm|mm|bmm|baddbmm|_grouped_mm)_?$|_linear_pointwise"),
        ("LoRA", _ANY, r"^metalora::|^_(token|weight)route"),
        ("copies and casts", _OWN, r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_)$"),
    )
)
OTHER = "other"
PARTS = (
    *("products", "LoRA", "attention", "normalisation", "activation", "dropout"),
    *("optimiser", "copies and casts", OTHER),
)


def part_of(names: Sequence[str]) -> str:
    """The part that an event belongs to.

    Args:
        names: its own, then those of the events around it, and of the forward operator.
    """
    for part, whose, pattern in _RULES:
        if any(pattern.search(name) for name in (names[:1] if whose == _OWN else names)):
            return part
    return OTHER


def shares(events: Iterable[Any]) -> dict[str, float]:
    """The share of each part in the profiled step; they add up to 1.

    Args:
        events: of `torch.profiler.profile`, with a range called `STEP` around the step.
    """
    events = list(events)
    makers: dict[int, Any] = {}  # of the node with this number: the last forward event that has it
    for event in events:
        if event.sequence_nr >= 0 and _backward(event) is None:
            makers[event.sequence_nr] = event
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in events:
        names = list(_names(event))
        if names[-1] != STEP:
            continue
        backward = _backward(event)
        if backward is not None and backward.sequence_nr in makers:
            names += _names(makers[backward.sequence_nr])
        seconds[part_of(names)] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {part: value / total for part, value in seconds.items()}


def _backward(event: Any) -> Any:
    """The range of the autograd node that the event is in, or None."""
    return next((e for e in _around(event) if e.name.startswith(_NODE)), None)


def _around(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _names(event: Any) -> Iterator[str]:
    return (one.name for one in _around(event))


@contextlib.contextmanager
def _dropout_named() -> Iterator[None]:
    """Within, what an nn.Dropout does is in a range called `DROPOUT`, whatever it is made of."""
    ranges: list[Any] = []

    def enter(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Dropout):
            ranges.append(record_function(DROPOUT))
            ranges[-1].__enter__()

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, nn.Dropout):
            ranges.pop().__exit__(None, None, None)

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step_shares(step: Callable[[], object]) -> dict[str, float]:
    """Profiles one call on the CPU; see `shares`."""
    cpu = [ProfilerActivity.CPU]
    with _dropout_named(), profile(activities=cpu) as recorded, record_function(STEP):
        step()
    return shares(recorded.events())
