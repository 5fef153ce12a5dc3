"""The two rates that bound every kernel: copying memory, and a dense bfloat16 product.

python -m benchmarks.ceilings [--device cuda] [--write DIR]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import torch

from benchmarks.lib.cli import DeviceSettings, parse
from benchmarks.lib.measure import Timing, side_by_side
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard

COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


def ceilings(device: str, smoke: bool = False) -> dict[str, tuple[float, Timing]]:
    """(bytes or operations a call, its timing) of "copy" and "gemm"."""
    count = 2**20 if smoke else COPY_BYTES[device]
    size = 64 if smoke else GEMM_SIZE[device]
    source = torch.randint(-128, 127, (count,), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(left)
    timings = side_by_side(
        {
            "copy": [{"copy": partial(target.copy_, source)}],
            "gemm": [{"gemm": partial(torch.mm, left, right, out=out)}],
        },
        device,
        rounds=2 if smoke else 25,
    )
    work = {"copy": 2.0 * count, "gemm": 2.0 * size**3}
    return {name: (work[name], timings[name]["total"]) for name in work}


def copy_bandwidth(found: Mapping[str, tuple[float, Timing]]) -> float:
    """Bytes read and written a second."""
    count, timing = found["copy"]
    return count / timing.median


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DeviceSettings, argv, "ceilings", __doc__)
    found = ceilings(settings.device, settings.smoke)
    texts = {
        "copy": ("copy, bytes read and written", "GB/s", 1e9),
        "gemm": ("dense bfloat16 product", "TFLOP/s", 1e12),
    }
    rows = []
    for name, (work, timing) in found.items():
        text, unit, scale = texts[name]
        rates = [f"{work / t / scale:,.1f}" for t in (timing.median, timing.high, timing.low)]
        low_high = f"{rates[1]}-{rates[2]}"
        rows.append([text, f"{rates[0]} {unit}", low_high, f"{100 * timing.spread:.1f} %"])
    write_table(
        f"ceilings_{settings.device}",
        "What the machine can do",
        f"python -m benchmarks.ceilings --device {settings.device}",
        ["", "median", "quartiles", "spread of two runs"],
        rows,
        {name: {"work": work, **asdict(timing)} for name, (work, timing) in found.items()},
        settings.write,
        settings.device,
    )


if __name__ == "__main__":
    main()
