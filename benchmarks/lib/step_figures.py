"""The figures of `benchmarks.steps`: how fast each version is, and where the time goes."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from benchmarks.lib.step_parts import PARTS
from benchmarks.lib.step_versions import (
    AUTHORS,
    FUSED,
    MERGED,
    PEFT,
    PLAIN,
    TO_THE_BATCH,
    in_precision,
)
from benchmarks.lib.task_by_task import FASTER
from experiments.lib import plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = ("dialogues", "mixer")  # side by side on the first figure
NAMES = {
    AUTHORS: "authors' schedule",
    PEFT: "PEFT, set_adapter",
    TO_THE_BATCH: "authors', padded to the batch",
    in_precision(AUTHORS, "bf16"): "authors' schedule, bf16",
    MERGED: "merged weights",
    in_precision(MERGED, "bf16"): "merged weights, bf16",
    f"{in_precision(MERGED, 'bf16')}, compiled": "merged weights, bf16, compiled",
    FUSED: "metalora",
    f"+ {FASTER}": "metalora, faster fp32 products",
    "+ bf16": "metalora, bf16",
    in_precision(PLAIN, "bf16"): "no adapters at all, bf16",
}
LIGHT = "#9ecae1"
COLORS = {
    "products": "#999999",
    "LoRA": plotting.BLUE,
    "attention": plotting.GREEN,
    "normalisation": "#F0E442",
    "activation": plotting.ORANGE,
    "dropout": plotting.PINK,
    "optimiser": "#E69F00",
    "copies and casts": "#56B4E9",
    "other": "#DDDDDD",
}
DARK = ("LoRA", "attention", "activation")  # with white labels


def draw_steps(record: Mapping[str, Any], stem: str, folder: Path) -> list[Path]:
    """Draws ``folder/<stem>.png``, the rates, and ``folder/<stem>_parts.png``."""
    plotting.style()
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    cases = [one for name in SHOWN for one in record["rows"] if one["case"] == name]
    rated = [one for one in cases or record["rows"] if "total" in one["rows"].get(AUTHORS, {})]
    if rated:
        drawn.append(_save(_rates(rated), record, folder / f"{stem}.png"))
    bars = [
        (one, name, row)
        for one in record["rows"]
        for name, row in one["rows"].items()
        if "parts" in row and "total" in row
    ]
    if bars:
        drawn.append(_save(_parts(bars), record, folder / f"{stem}_parts.png"))
    return drawn


def _save(fig: Figure, record: Mapping[str, Any], path: Path) -> Path:
    here = record["machine"]
    threads = "1 thread" if here["threads"] == "1" else f"{here['threads']} threads"
    source = ", ".join(
        [here.get("gpu", here["cpu"]), threads, f"torch {here['torch']}", here["date"]]
    )
    fig.supxlabel(source, x=0.995, ha="right", fontsize=10, color="#555555")
    fig.savefig(path)
    plt.close(fig)
    return path


def _rates(cases: Sequence[Mapping[str, Any]]) -> Figure:
    """A panel for each case: the rate of every version, relative to the authors' schedule."""
    fig, panels = plt.subplots(1, len(cases), figsize=(14.5, 6.4), squeeze=False)
    for axes, one in zip(panels[0], cases, strict=True):
        slowest = one["rows"][AUTHORS]["total"]["median"]
        rates = {
            name: slowest / one["rows"][name]["total"]["median"]
            for name in NAMES
            if "total" in one["rows"].get(name, {})
        }
        colors = [_color(name) for name in rates]
        places = range(len(rates))
        axes.barh(places, list(rates.values()), color=colors, height=0.72)
        for place, rate in zip(places, rates.values(), strict=True):
            axes.text(rate, place, f" {rate:.1f}×", va="center", fontsize=13)
        axes.set_yticks(places, [NAMES[name] for name in rates])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * max(rates.values()))
        axes.grid(visible=False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{one['work']['unit']} relative to the authors' schedule")
        title, _, rest = one["title"].partition(", ")
        wrapped = textwrap.fill(rest, 40)  # as wide as the bars
        axes.set_title(f"{title}\n{wrapped}", loc="left", fontsize=14)
    return fig


def _color(name: str) -> str:
    if name.startswith(PLAIN):
        return LIGHT
    return plotting.BLUE if name.startswith("+") else "#999999"


def _parts(bars: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]]) -> Figure:
    """A bar of stacked parts for every version that was profiled, in panels of one case each."""
    cases = list(dict.fromkeys(one["case"] for one, _, _ in bars))
    heights = [sum(one["case"] == case for one, _, _ in bars) for case in cases]
    fig, panels = plt.subplots(
        len(cases),
        1,
        figsize=(14, 1.6 + 0.85 * sum(heights)),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
    )
    for axes, case in zip(panels[:, 0], cases, strict=True):
        _stack(axes, [(one, name, row) for one, name, row in bars if one["case"] == case])
    handles, labels = panels[0, 0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper center", ncols=len(PARTS) // 2 + 1)
    panels[-1, 0].set_xlabel("seconds a step")
    return fig


def _stack(axes: Axes, bars: Sequence[tuple[Mapping[str, Any], str, Mapping[str, Any]]]) -> None:
    labels = []
    longest = max(row["total"]["median"] for _, _, row in bars)
    for place, (_, name, row) in enumerate(bars):
        left, median = 0.0, row["total"]["median"]
        for part in PARTS:
            width = median * row["parts"][part]
            axes.barh(place, width, left=left, color=COLORS[part], height=0.72, label=part)
            if width > 0.045 * longest:
                share = f"{100 * row['parts'][part]:.0f} %"
                ink = "white" if part in DARK else "black"
                where = (left + width / 2, place)
                axes.text(*where, share, ha="center", va="center", fontsize=12, color=ink)
            left += width
        kind = "plain model" if name.startswith(PLAIN) else "metalora"
        labels.append(f"{kind}, {row['precision']}")
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_title(bars[0][0]["title"], loc="left", fontsize=14)
    # One legend for all bars.
    handles, names = axes.get_legend_handles_labels()
    for handle, label in list(zip(handles, names, strict=True))[len(PARTS) :]:
        handle.set_label(f"_{label}")
