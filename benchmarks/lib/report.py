"""The tables and figures of the documentation, from the JSON files of benchmarks/results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import causal_memory, curves, freed_memory, scaling
from benchmarks.lib.step_figures import draw_steps
from benchmarks.lib.step_versions import (
    AT_ONCE,
    AUTHORS,
    COMPILED,
    FUSED,
    MERGED,
    PACKED,
    PLAIN,
    TO_THE_BATCH,
    in_precision,
)
from benchmarks.lib.tables import read_json, seconds
from experiments.lib.errors import RunError
from experiments.lib.tables import Table, three_digits

RESULTS = Path(__file__).resolve().parents[1] / "results"
LAYERS = {"loop": "loop over tasks", "bmm": "bmm", "merged": "merged weights"}
# Of the steps, and what they are called in the table; the last of metalora's in fp32 is shown.
STEPS = {
    AUTHORS: "the authors' schedule, fp32",
    TO_THE_BATCH: "the same, padded only to the batch",
    MERGED: "merged weights, fp32",
    f"{MERGED}, bf16": "merged weights, bf16",
    f"{MERGED}, bf16, compiled": "merged weights, bf16, compiled",
    FUSED: "metalora, fp32",
    "+ bf16": "**metalora, bf16**",
    COMPILED: "metalora, bf16, compiled",
    PLAIN: "plain model, fp32",
    in_precision(PLAIN, "bf16"): "plain model, bf16",
}
Record = Mapping[str, Any]


def tables() -> dict[str, Table]:
    """Returns all tables by name."""
    measured = {
        name: _with_source(make(found := read_json(RESULTS / f"{file}.json")), found, file)
        for name, (file, make) in _TABLES.items()
    }
    return {**measured, "scaling": scaling.table()}


def numbers_of(figure: str) -> Path:
    """Returns the file with the numbers of a figure.

    Raises:
        RunError: there is no such figure.
    """
    if figure not in _FIGURES:
        raise RunError(f"there is no figure {figure!r}; there are {', '.join(_FIGURES)}")
    return RESULTS / f"{_FIGURES[figure]}.json"


def draw_figure(figure: str, folder: Path) -> Path:
    """Draws ``folder/<figure>.png``, and what else is drawn with it."""
    record = read_json(numbers_of(figure))
    if _FIGURES[figure] == "curves_cpu":
        curves.draw(record["rows"], folder / f"{figure}.png")
    else:
        draw_steps(record, "steps", folder)
    return folder / f"{figure}.png"


def _with_source(table: Table, record: Record, file: str) -> Table:
    """Returns the table with its machine, its date, a link to all rows, and the command."""
    here = record["machine"]
    threads = "1 thread" if here["threads"] == "1" else f"{here['threads']} threads"
    machine = f"{here.get('gpu', here['cpu'])}, {threads}, torch {here['torch']}"
    rows = f"[all rows and the command](../benchmarks/results/{file}.md)"
    caption = " ".join(filter(None, [table.caption, f"{machine}; {here['date']}; {rows}."]))
    return Table(table.header, table.rows, caption, table.left)


def _layers(record: Record) -> Table:
    rows = [
        [
            one["case"],
            one["route"],
            f"{1e6 * one['rows'][record['floor']]['total']['median']:,.0f}",
            *(_relative(one, name) for name in ("metalora", *LAYERS)),
        ]
        for one in record["rows"]
        if one["precision"] == "fp32"
    ]
    header = ["tasks, features, rank, rows", "route", "dense layer, µs", "`lora_linear`"]
    return Table([*header, *LAYERS.values()], rows, left=2)


def _relative(one: Record, name: str) -> str:
    row = one["rows"].get(name, {})
    return f"{row['relative']:.2f}" if "relative" in row else ""


def _language(record: Record) -> Table:
    (one,) = record["rows"]
    base = one["rows"][record["floor"]]["total"]["median"]
    tokens = one["work"]["amounts"]["round"]
    rows = []
    for name, row in one["rows"].items():
        median = row["total"]["median"]
        rows.append(
            [
                name,
                three_digits(median),
                f"{100 * row['padding']:.0f} %",
                f"{tokens / median:,.0f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{base / median:.2f}",
            ]
        )
    header = ["version", "seconds a round", "padding", "tokens a second"]
    return Table([*header, "peak memory, MiB", "× authors'"], rows)


def _steps(record: Record) -> Table:
    rows = []
    for one in record["rows"]:
        timed = {name: row for name, row in one["rows"].items() if "total" in row}
        title = one["title"]  # said once, in the first row of the case
        for name, shown in STEPS.items():
            row = timed.get(name)
            if row is None and name == FUSED:
                row = timed.get(PACKED, timed.get(AT_ONCE))
            if row is None:
                continue
            median = row["total"]["median"]
            plain = timed.get(in_precision(PLAIN, row["precision"]))
            unit, amount = one["work"]["unit"], one["work"]["amounts"]["round"]
            authors = timed[AUTHORS]["total"]["median"] if AUTHORS in timed else None
            rows.append(
                [
                    title,
                    shown,
                    f"{amount / median:,.0f} {unit}",
                    f"{authors / median:.2f}" if authors else "",
                    f"{median / plain['total']['median']:.2f}" if plain else "",
                ]
            )
            title = ""
    return Table(["step", "version", "rate", "× authors'", "time / plain"], rows, left=2)


def _token_losses(record: Record) -> Table:
    rows = []
    for one in record["rows"]:
        for name, row in one["rows"].items():
            if "total" in row:
                rows.append(
                    [
                        one["case"],
                        one["precision"],
                        "whole logits" if name == "plain" else "`token_losses`",
                        f"{row['peak_bytes'] / 2**20:,.0f}",
                        seconds(row["total"]["median"]),
                    ]
                )
    return Table(
        ["tokens, features, vocabulary", "precision", "", "peak, MiB", "time"], rows, left=3
    )


def _memory(record: Record) -> Table:
    header, rows = causal_memory.paper_table(record["rows"]["paper"])
    caption = (
        f"{record['tasks']} tasks, rank {record['rank']}, {record['tokens']} tokens of a pass on "
        "each GPU. On paper; no model of this size was run."
    )
    return Table(header, rows, caption)


def _memory_measured(record: Record) -> Table:
    header, rows = causal_memory.measured_table(record["rows"]["measured"])
    return Table(header, rows, "In MiB.", left=1)


def _freed_memory(record: Record) -> Table:
    return Table(*freed_memory.table(record["rows"]), "", left=2)


def _curves(record: Record) -> Table:
    # Without the number of seeds and the loss that they start from.
    rows = [
        [name, *(number.replace("-", "−") for number in numbers)]
        for name, _, _, *numbers in curves.summary(record["rows"])
    ]
    return Table(["model and data", "fp32", "bf16", "bf16 − fp32", "spread of seeds"], rows)


def _trainings(record: Record) -> Table:
    versions = dict.fromkeys(name for one in record["rows"] for name in one["rows"])
    others = [name for name in versions if name != record["floor"]]
    rows = [
        [
            one["case"],
            one["precision"],
            seconds(one["rows"][record["floor"]]["total"]["median"]),
            *(_factor(one, name) for name in others),
        ]
        for one in record["rows"]
    ]
    return Table(["training", "precision", record["floor"], *others], rows, left=2)


def _factor(one: Record, name: str) -> str:
    row = one["rows"].get(name, {})
    return f"{three_digits(row['relative'])}×" if "relative" in row else ""


def _kills(record: Record) -> Table:
    header = ["processes", "parallel", "kills", "of these in a save", "trainings", "equal endings"]
    return Table(header, [[str(cell) for cell in row] for row in record["rows"]], left=2)


def _equality(record: Record) -> Table:
    header = ["training", "parallel", "two processes", "three processes"]
    rows = [[case, kind, *(f"{one:.0e}" for one in rest)] for case, kind, *rest in record["rows"]]
    return Table(header, rows, left=2)


def _packed_equality(record: Record) -> Table:
    header = ["model", "packed: losses", "gradients", "padded: losses", "gradients"]
    header += ["packed, bf16", "transformers, bf16"]
    rows = [[name, *(f"{one:.0e}" for one in rest)] for name, *rest in record["rows"]]
    return Table(header, rows)


def _packed_attention(record: Record) -> Table:
    rows = [
        [
            one["case"],
            one["precision"],
            seconds(one["rows"][record["floor"]]["total"]["median"]),
            *(_relative(one, name) for name in ("torch", "metalora")),
        ]
        for one in record["rows"]
    ]
    header = ["sequences, heads, features", "precision", "products and softmax"]
    return Table([*header, "torch's attention", "`packed_attention`"], rows, left=2)


_FIGURES = {"steps": "steps_cpu_1", "steps_parts": "steps_cpu_1", "precision": "curves_cpu"}
_TABLES: Mapping[str, tuple[str, Callable[[Record], Table]]] = {
    "layers": ("lora_linear_cpu", _layers),
    "language": ("language_cpu", _language),
    "decoder": ("decoder_cpu", _language),
    "steps": ("steps_cpu_1", _steps),
    "steps-two-cores": ("steps_cpu_2", _steps),
    "curves": ("curves_cpu", _curves),
    "token-losses": ("token_losses_cpu", _token_losses),
    "memory": ("causal_memory_cpu", _memory),
    "freed-memory": ("freed_memory_cpu", _freed_memory),
    "memory-measured": ("causal_memory_cpu", _memory_measured),
    "linear": ("linear_training_cpu", _trainings),
    "shallow": ("shallow_training_cpu", _trainings),
    "kills": ("kills", _kills),
    "equality": ("equality", _equality),
    "packed-equality": ("packed_equality", _packed_equality),
    "packed-attention": ("packed_attention_cpu", _packed_attention),
}
