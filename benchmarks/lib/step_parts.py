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
OTHER = "other"
_NODE = "autograd::engine::evaluate_function"
# The first part of which any name around an event speaks. All of attention is attention, its
# products and its dropout too; the large products of a LoRA layer are told from the rest of it.
_AROUND = {
    "optimiser": re.compile(r"^Optimizer\.|_fused_adam"),
    "attention": re.compile(r"attention|^_?[Aa]ttend|^_Pick", re.IGNORECASE),
    "normalisation": re.compile(r"norm", re.IGNORECASE),
    "activation": re.compile(r"gelu|relu|tanh|sigmoid", re.IGNORECASE),
    "dropout": re.compile(rf"^{DROPOUT}|^aten::.*(dropout|bernoulli)"),
}
_OWN = {
    "products": re.compile(
        r"^aten::(addmm|mm|bmm|baddbmm|addmv|mv|_grouped_mm)_?$|mkldnn.*linear|_linear_pointwise"
    ),
}
_LORA = {"LoRA": re.compile(r"^metalora::|^_(Token|Weight)Route")}
_MOVES = {"copies and casts": re.compile(r"^aten::(copy_|_to_copy|to|clone|contiguous|cat|fill_)$")}
PARTS = ("products", "LoRA", *_AROUND, "copies and casts", OTHER)


def part_of(names: Sequence[str]) -> str:
    """The part that an event belongs to.

    Args:
        names: its own, then those of the events around it, and of the forward operator.
    """
    for part, pattern in _AROUND.items():
        if any(pattern.search(name) for name in names):
            return part
    for part, pattern in _OWN.items():
        if pattern.search(names[0]):
            return part
    for part, pattern in _LORA.items():
        if any(pattern.search(name) for name in names):
            return part
    for part, pattern in _MOVES.items():
        if pattern.search(names[0]):
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
