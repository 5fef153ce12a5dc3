"""Timing side by side, and the tables that come of it."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import metalora


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median and the quartiles."""

    median: float
    low: float
    high: float


def side_by_side(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 25,
    seconds_a_round: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Times the candidates in turns, so that whatever else the machine does meets all of them.

    Every round times a block of calls of each candidate, as many as take about
    ``seconds_a_round``; a round gives one sample. ``clock`` may be ``time.process_time`` where all
    candidates run on one thread: waiting for a core that others use then does not count.
    """
    repeats = {}
    for name, call in candidates.items():
        call()
        start = clock()
        call()
        once = clock() - start
        repeats[name] = max(1, int(seconds_a_round / once))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, call in candidates.items():
            start = clock()
            for _ in range(repeats[name]):
                call()
            samples[name].append((clock() - start) / repeats[name])
    return {name: _timing(values) for name, values in samples.items()}


def _timing(values: Sequence[float]) -> Timing:
    low, median, high = statistics.quantiles(values, n=4)
    return Timing(median, low, high)


def machine() -> dict[str, str]:
    """What a timing depends on."""
    return {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metalora": metalora.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def write_table(
    name: str,
    title: str,
    command: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    data: Any,
    folder: Path | None,
) -> None:
    """Prints the table as Markdown and, given a folder, writes it there as .md and .json."""
    lines = [f"## {title}", ""]
    lines += ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    lines += ["", "; ".join(f"{key} {value}" for key, value in machine().items())]
    lines += ["", f"    {command}", ""]
    text = "\n".join(lines)
    print(text)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.md").write_text(text)
        record = {"title": title, "command": command, "machine": machine(), "rows": data}
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
