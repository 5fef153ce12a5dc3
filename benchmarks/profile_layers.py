"""Where the time of metalora's layer goes beside the dense layer's: the kernels of both.

python -m benchmarks.profile_layers [--device cuda] [--write DIR]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.lib.baselines import BASELINES, Setup
from benchmarks.lib.cli import DeviceSettings, parse
from benchmarks.lib.gate import Run, check, exact_results, wanted_gradients
from benchmarks.lib.registry import GOAL, PRECISIONS, Case, Precision
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard

CALLS = 10
SHOWN = 12


def kernels(case: Case, precision: Precision, name: str, device: str) -> list[dict[str, Any]]:
    """Seconds a forward and backward pass of every kernel (on a CPU: operator), longest first."""
    layer = BASELINES[name](Setup(case, precision, device))
    wanted = wanted_gradients(name != "dense", frozen=False)
    tensors = case.tensors(precision, device)
    run = Run(layer, tensors, wanted, precision)
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with precision.products():
        _calls(run, 2, device)
        exact = exact_results(case, tensors, wanted, adapters=name != "dense")
        check(case, run.results, exact, precision.tolerance)
        with profile(activities=[activity]) as recorded:
            _calls(run, CALLS, device)
    found = []
    for event in recorded.key_averages():
        on_device = event.device_type.name == "CUDA"
        if on_device == (device == "cuda"):
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            seconds = microseconds * 1e-6 / CALLS
            found.append({"kernel": event.key, "calls": event.count / CALLS, "seconds": seconds})
    return sorted(found, key=lambda kernel: -kernel["seconds"])


def _calls(run: Run, count: int, device: str) -> None:
    for _ in range(count):
        run.forward()
        run.backward()
    if device == "cuda":
        torch.cuda.synchronize()


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DeviceSettings, argv, "profile_layers", __doc__)
    device = settings.device
    cases = [GOAL[0], *(c for c in GOAL if c.group == "c")]
    if settings.smoke:
        cases = [cases[0].shrunk()]
    rows, data = [], []
    for precision in (PRECISIONS["autocast"], PRECISIONS["tf32"]):
        for case in cases:
            for name in ("metalora", "dense"):
                found = kernels(case, precision, name, device)
                total = sum(kernel["seconds"] for kernel in found)
                head = [case.name, precision.name, name]
                which = {"case": case.name, "precision": precision.name, "version": name}
                data.append({**which, "kernels": found})
                rows.append([*head, "all", "", f"{total * 1e6:,.1f}", ""])
                for kernel in found[:SHOWN]:
                    text = kernel["kernel"].replace("|", "\\|")[:90]
                    times = [f"{kernel['calls']:g}", f"{kernel['seconds'] * 1e6:,.1f}"]
                    share = f"{100 * kernel['seconds'] / total:.0f} %"
                    rows.append(["", "", "", f"`{text}`", *times, share])
    write_table(
        f"profile_{device}",
        "Kernels of one forward and backward pass",
        f"python -m benchmarks.profile_layers --device {device}",
        ["case", "precision", "version", "kernel", "calls", "µs", "share"],
        rows,
        data,
        settings.write,
        device,
    )


if __name__ == "__main__":
    main()
