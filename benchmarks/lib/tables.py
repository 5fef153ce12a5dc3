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
from experiments.lib.machine import cpu_name
from experiments.lib.tables import three_digits
from metalora._files import replacing

Row = Sequence[str]


def machine(device: str = "cpu") -> dict[str, str]:
    """What a timing depends on."""
    found = {
        "cpu": cpu_name(),
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


def write_json(path: Path, record: Mapping[str, Any] | Sequence[Any]) -> None:
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


def operator_tables(record: Mapping[str, Any]) -> str:
    """The page of an operator's benchmark: ratios for all cases, then every row with details."""
    records, floor = record["rows"], record["floor"]
    names = [n for n in dict.fromkeys(n for r in records for n in r["rows"]) if n != floor]
    ratios = [
        [
            r["case"],
            r["precision"],
            r.get("route", ""),
            _time(r["rows"].get(floor, {}), "total"),
            *(_ratio(r["rows"].get(name, {})) for name in names),
        ]
        for r in records
    ]
    details = [
        _details(r, name, row) for r in records for name, row in r["rows"].items() if "total" in row
    ]
    others: dict[str, list[str]] = {}
    for r in records:
        for name, row in r["rows"].items():
            if text := row["status"] if row["status"] != "timed" else row["note"]:
                others.setdefault(f"{name}: {text}", []).append(f"{r['case']}, {r['precision']}")
    parts = [
        f"Time relative to {floor}.",
        markdown(*_without_empty(["case", "precision", "route", floor, *names], ratios)),
        "Medians and quartiles. Spread: how far the medians of two runs are apart. Error: the "
        "largest relative error of any result against float64. Memory: what the results and "
        "everything between take at most.",
        markdown(*_without_empty(DETAILS, details)),
    ]
    if others:
        parts += ["Without a time, or timed in another way:"]
        parts += ["\n".join(f"- {text} ({'; '.join(where)})" for text, where in others.items())]
    return page(record, *parts)


DETAILS = [
    "case",
    "precision",
    "version",
    "forward",
    "backward",
    "total (quartiles)",
    "relative",
    "spread",
    "error",
    "padding",
    "peak memory, MiB",
    "rate",
]


def _details(record: Mapping[str, Any], name: str, row: Mapping[str, Any]) -> list[str]:
    total, peak, work = row["total"], row["peak_bytes"], record.get("work")
    rate = ""
    if work and row.keys() >= work["amounts"].keys():
        rates = [n / row[step]["median"] / work["scale"] for step, n in work["amounts"].items()]
        rate = f"{' / '.join(map(three_digits, rates))} {work['unit']}"
    return [
        record["case"],
        record["precision"],
        name,
        _time(row, "forward"),
        _time(row, "backward"),
        f"{seconds(total['median'])} ({seconds(total['low'])} to {seconds(total['high'])})",
        _ratio(row),
        f"{100 * total['spread']:.0f} %",
        f"{row['error']:.0e}",
        "" if row.get("padding") is None else f"{100 * row['padding']:.0f} %",
        "" if peak is None else f"{peak / 2**20:,.0f}",
        rate,
    ]


def _without_empty(header: Row, rows: Sequence[Row]) -> tuple[Row, Sequence[Row]]:
    """The columns in which any row has a text."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['relative']:,.2f}" if "relative" in row else ""


def _time(row: Mapping[str, Any], step: str) -> str:
    return seconds(row[step]["median"]) if step in row else ""


def seconds(value: float) -> str:
    """A time with three digits: 4.85 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= 0.9995 * size:
            return f"{three_digits(value / size)} {unit}"
    return f"{three_digits(value * 1e6)} µs"
