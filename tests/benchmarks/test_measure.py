"""Timing in turns."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks.lib.measure import (
    Budget,
    CpuClock,
    graphed,
    peak_bytes,
    side_by_side,
)

pytestmark = pytest.mark.slow


def test_steps_are_timed_apart() -> None:
    def wait(seconds: float):
        return lambda: time.sleep(seconds)

    timings = side_by_side(
        {
            "short": [{"forward": wait(0.001), "backward": wait(0.003)}],
            "long": [{"forward": wait(0.03)}],
        },
        rounds=4,
        seconds_a_turn=0.008,
    )
    short, long = timings["short"], timings["long"]
    assert 0.001 <= short["forward"].low <= short["forward"].median <= short["forward"].high
    assert short["forward"].median < short["backward"].median < short["total"].median
    assert short["total"].median < long["total"].median == long["forward"].median
    assert short["total"].spread >= 0


def test_data_are_taken_in_rotation() -> None:
    calls: list[str] = []
    sets = [{"step": lambda name=name: calls.append(name) or time.sleep(0.001)} for name in "abc"]
    side_by_side({"": sets}, rounds=1, seconds_a_turn=0.1)
    assert "abcabc" in "".join(calls)


def test_the_spread_is_between_the_two_runs() -> None:
    now, calls = 0.0, 0

    def step() -> None:
        nonlocal now, calls
        calls += 1
        # 4 to warm up, then 3 turns of 2 in the first run
        now += 1.0 if calls <= 4 + 2 * 3 else 1.5

    timer = CpuClock(lambda: now)
    found = side_by_side({"": [{"step": step}]}, rounds=3, seconds_a_turn=0.0, timer=timer)
    timing = found[""]["step"]
    assert timing.spread == pytest.approx(0.5)
    assert timing.median == pytest.approx(1.25)


def test_long_steps_are_called_once_a_run_and_begin_in_turn() -> None:
    now, calls = 0.0, []

    def step(name: str, seconds: float) -> None:
        nonlocal now
        calls.append(name)
        now += seconds + (len(calls) > 4)  # a second more in the second run

    steps = {
        name: [{"step": lambda n=name, s=seconds: step(n, s)} for seconds in (1.0, 2.0)]
        for name in "ab"
    }
    found = side_by_side(steps, rounds=2, warm=False, timer=CpuClock(lambda: now))
    assert "".join(calls) == "abba" + "abba"
    for timing in (each["step"] for each in found.values()):
        assert timing.median == 2.0 and timing.spread == pytest.approx(2.5 / 1.5 - 1)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def step() -> None:
        a = torch.zeros(1000)
        b = a + 1
        del a
        (b * 2).sum()

    assert 8000 <= peak_bytes(step, "cpu") < 9000


def test_budget() -> None:
    assert Budget().allows(1e9)
    assert Budget(10).allows(5) and not Budget(10).allows(20)


@pytest.mark.gpu
def test_steps_become_graphs_or_say_why_not() -> None:
    x = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    steps, note = graphed({"add": lambda: x.add_(1)})
    assert note == "" and x.tolist() == [0, 0, 0]
    steps["add"]()
    assert x.tolist() == [1, 1, 1]
    steps, note = graphed({"wait": lambda: x.sum().item()})
    assert note.startswith("not captured: ")
    assert steps["wait"]() == 3
