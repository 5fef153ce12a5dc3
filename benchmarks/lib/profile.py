"""Where the time of each version goes: its kernels, or on a CPU its operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from benchmarks.lib.cases import Case, Options, Precision
from benchmarks.lib.measure import Steps

CALLS = 10
SHOWN = 12
HEADER = ["case", "precision", "version", "kernel", "calls", "µs", "share"]


def kernels(steps: Steps, device: str) -> list[dict[str, Any]]:
    """Seconds a call of every kernel, longest first."""
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profiled(activities=[activity]) as recorded:
        for _ in range(CALLS):
            for step in steps.values():
                step()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in recorded.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == (device == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds = microseconds * 1e-6 / CALLS
            found.append({"kernel": event.key, "calls": event.count / CALLS, "seconds": seconds})
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def profile(
    cases: Sequence[Case], precisions: Sequence[Precision], options: Options
) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """The rows of a table with each version's longest kernels, and the data of all.

    Raises:
        GateError, NotOfferedError: a version is wrong, or there is none for a case.
    """
    rows, data = [], []
    for precision in precisions:
        for case in cases:
            with precision.products():
                make = case.candidates(precision, options)
                for version in case.offered(options.names):
                    found = kernels(make(version).sets[0], options.device)
                    total = sum(kernel["seconds"] for kernel in found)
                    which = {"case": case.name, "precision": precision.name, "version": version}
                    data.append({**which, "kernels": found})
                    rows.append([*which.values(), "all", "", f"{total * 1e6:,.1f}", ""])
                    for kernel in found[:SHOWN]:
                        text = kernel["kernel"].replace("|", "\\|")[:90]
                        times = [f"{kernel['calls']:g}", f"{kernel['seconds'] * 1e6:,.1f}"]
                        share = f"{100 * kernel['seconds'] / total:.0f} %"
                        rows.append(["", "", "", f"`{text}`", *times, share])
    return rows, data
