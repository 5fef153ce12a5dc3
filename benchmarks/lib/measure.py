"""Timing in turns, on the CPU and on a GPU."""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from typing import Any, Protocol

import torch
from torch.profiler import ProfilerActivity, profile

from metalora._checks import first_line

Step = Callable[[], object]
Steps = Mapping[str, Step]  # run one after the other and timed apart: {"forward": …, …}


@dataclass(frozen=True)
class Timing:
    """Seconds a call: median and quartiles of all samples, and how far two runs are apart.

    ``spread`` is the difference between the two runs' medians, relative to the smaller.
    """

    median: float
    low: float
    high: float
    spread: float


class Clock(Protocol):
    """Marks moments on the device's own time line, without synchronising with it."""

    def mark(self) -> Any: ...

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Synchronises with the device; returns the time between each mark and the next."""


class CpuClock:
    """Reads ``now``.

    With ``time.process_time``, for candidates on one thread, waiting for a core that other
    processes use does not count.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now

    def mark(self) -> float:
        return self.now()

    def seconds(self, marks: Sequence[float]) -> list[float]:
        return [later - earlier for earlier, later in pairwise(marks)]


class CudaClock:
    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[torch.cuda.Event]) -> list[float]:
        torch.cuda.synchronize()
        return [e.elapsed_time(later) * 1e-3 for e, later in pairwise(marks)]


def clock(device: str) -> Clock:
    return CudaClock() if device == "cuda" else CpuClock()


def side_by_side(
    candidates: Mapping[str, Sequence[Steps]],
    device: str = "cpu",
    *,
    rounds: int = 25,
    seconds_a_turn: float = 0.02,
    warm: bool = True,
    timer: Clock | None = None,
    scales: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, dict[str, Timing]]:
    """Times candidates in turns, so that whatever else the machine does meets all of them.

    Every candidate is a sequence of equal steps over different data, taken in rotation. A turn is
    one call that is not counted and as many counted ones as take about ``seconds_a_turn``, and
    gives one sample. Two runs of ``rounds`` turns are made; another candidate begins each time.

    Args:
        candidates: sets of steps by name.
        device: whose clock is read.
        rounds: turns of each candidate in each of the two runs.
        seconds_a_turn: how long a turn is to take.
        warm: False for steps that take seconds and have been called before: a turn is one call.
        timer: the clock; None is the device's own.
        scales: by candidate and step, what to multiply times by (default: 1).

    Returns:
        For each candidate the timing of every step, and of the sum as "total".
    """
    timer, names = timer or clock(device), list(candidates)
    repeats = dict.fromkeys(names, 1)
    for name, sets in candidates.items() if warm else ():
        for steps in sets:
            _turn(timer, [steps], 1)
        once = sum(_turn(timer, sets, 1).values())
        repeats[name] = max(1, int(seconds_a_turn / once))
    runs: list[dict[str, list[dict[str, float]]]] = [{n: [] for n in names} for _ in range(2)]
    for i, (run, turn) in enumerate(product(runs, range(rounds))):
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            first = turn * repeats[name]
            run[name].append(_turn(timer, candidates[name], repeats[name], first, warm))
    first_run, second_run = runs
    return {
        name: _timings(first_run[name], second_run[name], (scales or {}).get(name, {}))
        for name in names
    }


def _turn(
    timer: Clock, sets: Sequence[Steps], repeats: int, first: int = 0, warm: bool = True
) -> dict[str, float]:
    """Seconds a call of every step, over ``repeats`` sets from number ``first`` on."""
    for step in sets[(first - 1) % len(sets)].values() if warm else ():
        step()
    marks = [timer.mark()]
    for i in range(first, first + repeats):
        for step in sets[i % len(sets)].values():
            step()
            marks.append(timer.mark())
    seconds = timer.seconds(marks)
    count = len(sets[0])
    return {name: sum(seconds[i::count]) / repeats for i, name in enumerate(sets[0])}


def _timings(
    first: Sequence[Mapping[str, float]],
    second: Sequence[Mapping[str, float]],
    scales: Mapping[str, float],
) -> dict[str, Timing]:
    """The timing of every step and of their sum, from the samples of two runs."""
    scaled = [
        [{step: t * scales.get(step, 1.0) for step, t in sample.items()} for sample in run]
        for run in (first, second)
    ]
    found = {
        step: _timing(*([sample[step] for sample in run] for run in scaled)) for step in first[0]
    }
    return found | {"total": _timing(*([sum(s.values()) for s in run] for run in scaled))}


def _timing(first: Sequence[float], second: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles([*first, *second], n=4, method="inclusive")
    one, other = sorted((statistics.median(first), statistics.median(second)))
    return Timing(median, low, high, other / one - 1)


def peak_bytes(step: Step, device: str) -> int:
    """The most that ``step`` allocates at once, including the tensors it leaves."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    events = record.profiler.kineto_results.events()
    changes = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(accumulate((e.nbytes() for e in changes), initial=0))


def copies_past_the_cache(size: int, device: str) -> int:
    """How many sets of ``size`` bytes to rotate so that no call finds its data in the L2 cache."""
    if device == "cpu":
        return 1
    cache: int = torch.cuda.get_device_properties(device).L2_cache_size
    return min(16, math.ceil(1 + 2 * cache / size))


@contextlib.contextmanager
def beside_default_stream(device: str) -> Iterator[None]:
    """Runs its body on a stream of its own on a GPU, ordered with the work before and after."""
    if device == "cpu":
        yield
        return
    stream = _side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all: memory freed on a stream serves that stream only


def graphed(steps: Mapping[str, Step]) -> tuple[Steps, str]:
    """The steps as replays of CUDA graphs in one memory pool, or unchanged with the reason."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    try:
        for name, step in steps.items():
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(graphs.values())).pool() if graphs else None
            with torch.cuda.graph(graph, pool=pool):
                step()
            graphs[name] = graph
    except Exception as error:
        torch.cuda.synchronize()
        return steps, f"not captured: {first_line(error)}"
    return {name: graph.replay for name, graph in graphs.items()}, ""


class Budget:
    """The seconds that a measurement may take; callers leave out, by name, what does not fit."""

    def __init__(self, seconds: float = math.inf) -> None:
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def allows(self, seconds: float) -> bool:
        return time.monotonic() + seconds <= self._end
