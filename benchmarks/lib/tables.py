"""Tables of measurements as Markdown and JSON, with the machine and versions they come from."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import metalora
from experiments.lib.errors import RunError
from metalora._files import replacing

Row = Sequence[str]


def machine(device: str = "cpu") -> dict[str, str]:
    """What a timing depends on."""
    found = {
        "cpu": _cpu_name(),
        "threads": str(torch.get_num_threads()),
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "metalora": metalora.__version__,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found = {
            "gpu": gpu.name,
            "SMs": str(gpu.multi_processor_count),
            "L2": f"{gpu.L2_cache_size / 2**20:.0f} MiB",
            "memory": f"{gpu.total_memory / 2**30:.0f} GiB",
            "CUDA": str(torch.version.cuda),
            **found,
        }
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def read_json(path: Path) -> Any:
    """What `write_json` wrote.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise RunError(f"{path} is damaged or no JSON file") from None


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Replaces the file in one step, so that it is whole whenever it is read."""
    with replacing(path) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())


def write_table(
    name: str,
    title: str,
    command: str,
    header: Row,
    rows: Sequence[Row],
    data: Any,
    folder: Path | None,
    device: str = "cpu",
) -> None:
    """Prints the table as Markdown and, given a folder, writes it there as .md and .json."""
    record = {"title": title, "command": command, "machine": machine(device), "rows": data}
    text = page(record, markdown(header, rows))
    print(text)
    if folder is not None:
        write_json(folder / f"{name}.json", record)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")


def page(record: Mapping[str, Any], *parts: str) -> str:
    """A page of tables: the title, the parts, the machine, and the command that repeats it."""
    here = "; ".join(f"{key} {value}" for key, value in record["machine"].items())
    return "\n\n".join([f"## {record['title']}", *parts, here, f"    {record['command']}"]) + "\n"


def markdown(header: Row, rows: Sequence[Row]) -> str:
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)
    )


def layer_tables(record: Mapping[str, Any]) -> str:
    """The page of `benchmarks.layers`: ratios for all cases, then every row with its details."""
    records = record["rows"]
    names = list(dict.fromkeys(name for r in records for name in r["rows"]))
    ratios = [
        [
            *(r["case"], r["precision"], r["route"], _microseconds(r["rows"].get("dense", {}))),
            *(_ratio(r["rows"].get(name, {})) for name in names if name != "dense"),
        ]
        for r in records
    ]
    details = [_details(r, name, row) for r in records for name, row in r["rows"].items()]
    others: dict[str, list[str]] = {}
    for r in records:
        for name, row in r["rows"].items():
            if text := row["status"] if row["status"] != "timed" else row["note"]:
                others.setdefault(f"{name}: {text}", []).append(f"{r['case']}, {r['precision']}")
    parts = [
        "Time relative to the dense layer alone; the route is that of metalora.",
        markdown(
            ["case", "precision", "route", "dense, µs", *(n for n in names if n != "dense")], ratios
        ),
        "Medians and quartiles in µs. Spread: how far the medians of two runs are apart. Error: "
        "the largest relative error of y and the gradients, of any task, against float64. Memory: "
        "what the results and everything between take at most.",
        markdown(
            [
                *("case", "precision", "version", "forward", "backward", "both (quartiles)"),
                *("relative", "spread", "error", "peak memory, MiB"),
            ],
            [row for row in details if row],
        ),
    ]
    if others:
        parts += ["Without a time, or timed by events instead of replays of a CUDA graph:"]
        parts += ["\n".join(f"- {text} ({'; '.join(where)})" for text, where in others.items())]
    return page(record, *parts)


def _details(record: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> list[str]:
    if "total" not in row:
        return []
    total, peak = row["total"], row["peak_bytes"]
    return [
        *(record["case"], record["precision"], name),
        *(_us(row[step]["median"]) for step in ("forward", "backward")),
        f"{_us(total['median'])} ({_us(total['low'])}-{_us(total['high'])})",
        *(_ratio(row), f"{100 * total['spread']:.0f} %", f"{row['error']:.0e}"),
        "" if peak is None else f"{peak / 2**20:,.0f}",
    ]


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['relative']:.2f}" if "relative" in row else ""


def _microseconds(row: Mapping[str, Any]) -> str:
    return _us(row["total"]["median"]) if "total" in row else ""


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f}"
