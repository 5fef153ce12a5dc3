"""Draws what a benchmark measured.

python -m benchmarks.plot benchmarks/results/lora_linear_cpu.json [MORE.json …] [--write DIR]
python -m benchmarks.plot benchmarks/results/steps_cpu.json --write docs --name steps

Of an operator: relative times, a dot for each version, a figure for every precision as PNG and PDF.
Of whole steps: how fast each version is, in NAME.png, and where the time goes, in NAME_parts.png.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.lib.cli import check_folder, program
from benchmarks.lib.step_figures import draw_steps
from benchmarks.lib.tables import read_json
from benchmarks.lora_linear import BENCHMARK
from experiments.lib import plotting
from experiments.lib.cli import main_guard, option, parse
from experiments.lib.errors import RunError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GOAL_RATIO = 1.10
TICKS = (0.1, 0.2, 0.5, 0.7, 1, 1.2, 1.5, 2, 3, 5, 7, 10, 20, 50, 100, 1000, 10000)
# Okabe and Ito, "Color Universal Design", 2008; with the shapes, a pair of its own for each of 35
# versions. metalora's own are all blue.
BLUE, *COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#999999")
MARKERS = "oXsPvhp"


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The color and the shape of every version."""
    versions = dict.fromkeys(name.partition("+")[0] for name in names)
    ours = [name for name in versions if name.startswith("metalora")]
    others = [name for name in versions if name not in ours]
    found = {name: (BLUE, "D^<>"[i % 4]) for i, name in enumerate(ours)}
    pairs = zip(others, cycle(COLORS), cycle(MARKERS), strict=False)
    return found | {name: (color, marker) for name, color, marker in pairs}


def load(path: Path) -> dict[str, Any]:
    """One file of results of an operator's benchmark.

    Raises:
        RunError: the file is no such one.
    """
    record = read_json(path)
    try:
        known = [record[key] for key in ("title", "floor")]
        known += [record["machine"][key] for key in ("cpu", "torch", "date")]
        for one in record["rows"]:
            known += [one["case"], one["precision"]]
            known += [row["status"] for row in one["rows"].values()]
    except (KeyError, TypeError, AttributeError):
        raise RunError(f"{path} is not a file of results of an operator") from None
    return record


def draw(record: dict[str, Any], stem: str, folder: Path) -> list[Path]:
    """The figures of one file of results, ``folder/<stem>_<precision>``; the PNG of each.

    Those of whole steps are `step_figures.draw_steps`.
    """
    if any("title" in one for one in record["rows"]):
        return draw_steps(record, stem, folder)
    plotting.style()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for precision in dict.fromkeys(r["precision"] for r in record["rows"]):
        records = [
            {"case": r["case"], "ratios": ratios}
            for r in record["rows"]
            if r["precision"] == precision and (ratios := _ratios(r, record["floor"]))
        ]
        if records:
            drawn.append(_figure(record, precision, records, folder / f"{stem}_{precision}"))
    return drawn


def _ratios(record: dict[str, Any], floor: str) -> dict[str, float]:
    """The times of all versions that have one, relative to the floor's."""
    rows = record["rows"].items()
    return {name: row["relative"] for name, row in rows if "relative" in row and name != floor}


def _figure(
    record: dict[str, Any], precision: str, records: Sequence[dict[str, Any]], path: Path
) -> Path:
    versions = looks(name for one in records for name in one["ratios"])
    height = max(2.6 + 0.42 * len(records), 0.8 + 0.34 * len(versions))
    fig, axes = plt.subplots(figsize=(13.3, height))
    for y, one in enumerate(reversed(records)):
        for name, ratio in one["ratios"].items():
            _dot(axes, name, versions[name.partition("+")[0]], ratio, y)
    goals = {case.name for case in BENCHMARK.goals}
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
    axes.set_xlabel(f"time relative to {record['floor']} (log scale)")
    axes.set_title(f"{record['title']}, {precision}", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
    here = record["machine"]
    source = ", ".join([here.get("gpu", here["cpu"]), f"torch {here['torch']}", here["date"]])
    fig.text(0.995, 0.005, source, ha="right", va="bottom", fontsize=10, color="#555555")
    fig.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})
    fig.savefig(path.with_suffix(".png"))
    plt.close(fig)
    return path.with_suffix(".png")


def _dot(axes: Axes, name: str, look: tuple[str, str], ratio: float, y: float) -> None:
    """One mark: filled for eager versions, hollow for compiled ones, larger for max-autotune."""
    version, _, mode = name.partition("+")
    color, marker = look
    _, labels = axes.get_legend_handles_labels()
    axes.plot(
        [ratio],
        [y],
        linestyle="none",
        marker=marker,
        color=color,
        markersize=13 if mode == "max-autotune" else 9,
        fillstyle="none" if mode else "full",
        label=None if name in labels else name,
        zorder=3 if version == "metalora" else 2,
    )


@dataclass(frozen=True)
class Settings:
    """Which files to draw."""

    files: tuple[Path, ...] = option(help="files of results", positional=True)
    write: Path | None = option(None, help="folder to write to (default: beside each file)")
    name: str | None = option(None, help="of the figures of one file (default: the file's)")

    def __post_init__(self) -> None:
        check_folder("write", self.write)
        if self.name is not None and len(self.files) > 1:
            raise ValueError("argument --name: needs a single file to draw")


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Draws the figures, once every file has been read."""
    settings = parse(Settings, argv, prog=program("plot"), description=__doc__ or "")
    records = {path: load(path) for path in settings.files}
    for path, record in records.items():
        for figure in draw(record, settings.name or path.stem, settings.write or path.parent):
            print(figure)


if __name__ == "__main__":
    main()
