"""Where the time of metalora's layer goes beside the dense layer's: the kernels of both.

python -m benchmarks.profile [--device cuda] [--write DIR]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from benchmarks.lib.cases import PRECISIONS, Precision
from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.tables import write_table
from benchmarks.lib.tensor_case import Setup
from benchmarks.lora_linear import GOALS, LayerCase
from experiments.lib.cli import main_guard, parse

CALLS = 10
SHOWN = 12


def kernels(
    case: LayerCase, precision: Precision, version: str, device: str
) -> list[dict[str, Any]]:
    """Seconds a forward and backward pass of every kernel (on a CPU: operator), longest first."""
    tensors = case.tensors(precision, device)
    run = case.run(version, tensors, Setup(case, precision, device))
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU

    def call(count: int) -> None:
        for _ in range(count):
            run.forward()
            run.backward()
        if device == "cuda":
            torch.cuda.synchronize()

    with precision.products():
        call(2)
        exact = case.exact_results(version, tensors, list(run.leaves))
        case.check(version, run.results, exact, precision.tolerance)
        with profiled(activities=[activity]) as recorded:
            call(CALLS)
    found = []
    for event in recorded.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == (device == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds = microseconds * 1e-6 / CALLS
            found.append({"kernel": event.key, "calls": event.count / CALLS, "seconds": seconds})
    return sorted(found, key=lambda kernel: -kernel["seconds"])


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(BenchmarkSettings, argv, prog=program("profile"), description=__doc__ or "")
    device, cases = settings.device, list(GOALS)
    cases = [cases[0], *(c for c in cases if c.group == "c")]
    if settings.smoke:
        cases = [cases[0].shrunk()]
    rows, data = [], []
    for precision in (PRECISIONS["autocast"], PRECISIONS["tf32"]):
        for case in cases:
            for version in ("metalora", "dense"):
                found = kernels(case, precision, version, device)
                total = sum(kernel["seconds"] for kernel in found)
                which = {"case": case.name, "precision": precision.name, "version": version}
                data.append({**which, "kernels": found})
                rows.append([*which.values(), "all", "", f"{total * 1e6:,.1f}", ""])
                for kernel in found[:SHOWN]:
                    text = kernel["kernel"].replace("|", "\\|")[:90]
                    times = [f"{kernel['calls']:g}", f"{kernel['seconds'] * 1e6:,.1f}"]
                    share = f"{100 * kernel['seconds'] / total:.0f} %"
                    rows.append(["", "", "", f"`{text}`", *times, share])
    write_table(
        settings.name or f"profile_{device}",
        "Kernels of one forward and backward pass",
        repeat("profile", argv),
        ["case", "precision", "version", "kernel", "calls", "µs", "share"],
        rows,
        data,
        settings.write,
        device,
    )


if __name__ == "__main__":
    main()
