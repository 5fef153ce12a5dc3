"""Draws what `benchmarks.layers` measured: time relative to the dense layer, a dot per version.

python -m benchmarks.plot benchmarks/results/layers_cpu.json [MORE.json …] [--write DIR]

Makes one figure for every file and precision in it, as PNG and PDF.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.registry import GOAL
from experiments import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOAL_RATIO = 1.10
TICKS = (0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 50, 100)
# Okabe and Ito, "Color Universal Design", 2008; a shape of its own as well for each version.
LOOKS = {
    "metalora": ("#0072B2", "D"),
    "metalora-weight": ("#0072B2", ">"),
    "metalora-keep": ("#0072B2", "^"),
    "metalora-token": ("#0072B2", "<"),
    "merged": ("#D55E00", "o"),
    "merged-grouped": ("#D55E00", "X"),
    "bmm": ("#009E73", "s"),
    "grouped": ("#009E73", "P"),
    "unsloth": ("#CC79A7", "v"),
    "loop": ("#E69F00", "h"),
    "peft": ("#999999", "p"),
    "dense": ("#000000", "|"),
}


def draw(path: Path, folder: Path) -> list[Path]:
    """The figures of one file of results; the PNG of each."""
    record = json.loads(path.read_text(encoding="utf-8"))
    plotting.style()
    drawn = []
    for precision in dict.fromkeys(r["precision"] for r in record["rows"]):
        records = [r for r in record["rows"] if r["precision"] == precision and _timed(r)]
        if records:
            drawn.append(_figure(record, precision, records, folder / f"{path.stem}_{precision}"))
    return drawn


def _timed(record: dict[str, Any]) -> bool:
    """Whether any version beside the dense layer has a time relative to it."""
    return any("relative" in row for name, row in record["rows"].items() if name != "dense")


def _figure(
    record: dict[str, Any], precision: str, records: Sequence[dict[str, Any]], path: Path
) -> Path:
    versions = {name for one in records for name in one["rows"]}
    height = max(2.6 + 0.42 * len(records), 0.8 + 0.34 * len(versions))
    fig, axes = plt.subplots(figsize=(13.3, height))
    for y, one in enumerate(reversed(records)):
        for name, row in one["rows"].items():
            if "relative" in row and name != "dense":
                _dot(axes, name, row["relative"], y)
    goals = {case.name for case in GOAL}
    axes.axvline(1, color="black", linewidth=1.2)
    if any(one["case"] in goals for one in records):
        axes.axvline(GOAL_RATIO, color="#0072B2", linewidth=1.2, linestyle="--")
        axes.text(GOAL_RATIO, -0.75, f" goal {GOAL_RATIO:.2f}", color="#0072B2", fontsize=12)
    axes.set_yticks(range(len(records)), [one["case"] for one in reversed(records)])
    axes.set_ylim(-0.9, len(records) - 0.4)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.95), max(high, 1.25))
    axes.set_xlabel("time relative to the dense layer alone (log scale)")
    axes.set_title(f"{record['title']}, {precision}", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    here = record["machine"]
    source = ", ".join([here.get("gpu", here["cpu"]), f"torch {here['torch']}", here["date"]])
    fig.text(0.995, 0.005, source, ha="right", va="bottom", fontsize=10, color="#555555")
    fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    fig.savefig(path.with_suffix(".png"))
    plt.close(fig)
    return path.with_suffix(".png")


def _dot(axes: Axes, name: str, ratio: float, y: float) -> None:
    """One mark: filled for eager versions, hollow for compiled ones, larger for max-autotune."""
    version, _, mode = name.partition("+")
    color, marker = LOOKS[version]
    _, labels = axes.get_legend_handles_labels()
    axes.plot(
        *([ratio], [y]),
        linestyle="none",
        marker=marker,
        color=color,
        markersize=13 if mode == "max-autotune" else 9,
        fillstyle="none" if mode else "full",
        label=None if name in labels else name,
        zorder=3 if version == "metalora" else 2,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    parser.add_argument("--write", type=Path, metavar="DIR", help="beside the file by default")
    arguments = parser.parse_args(argv)
    for path in arguments.files:
        for figure in draw(path, arguments.write or path.parent):
            print(figure)


if __name__ == "__main__":
    main()
