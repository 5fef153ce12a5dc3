"""Figures of a ratings run, from what its folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.lib import plotting
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Comparison
from experiments.ratings.summary import RMSE, summary

Lines = Sequence[Mapping[str, Any]]
BASELINES = {
    "biases": ("User and item bias", "#999999", "P"),
    "factors": ("Matrix factorisation", "#000000", "X"),
}
DASHES = {"lora": "-", "last-layer": "--", "user-bias": ":"}
SHORT = {"lora": "LoRA", "last-layer": "last layer", "user-bias": "user bias"}
# The lines of the figure over shots: each method with the fine-tuning that it is made for, standard
# retraining with all.
SHOWN = (
    ("last-layer-ml", "last-layer"),
    ("lora-ml", "lora"),
    ("standard", "last-layer"),
    ("standard", "lora"),
    ("standard", "user-bias"),
)


def draw(run: RunFiles) -> list[Path]:
    """Draws rmse.png (over shots), tasks.png and rank.png (over several), with their numbers."""
    lines = summary(run.rows())
    if not lines:
        return []
    plotting.style()
    settings = run.manifest["settings"]
    most, rank = str(max(settings["tasks"])), str(settings["rank"][0])
    at = [line for line in lines if line["tasks"] == most]
    paths = [_over_shots(run, [line for line in at if line["rank"] in ("", rank)])]
    if len(settings["tasks"]) > 1:
        paths.append(_over_tasks(run, [line for line in lines if line["rank"] in ("", rank)]))
    if len(settings["rank"]) > 1:
        paths.append(_over_ranks(run, at))
    return paths


def _over_shots(run: RunFiles, lines: Lines) -> Path:
    """Draws the RMSE less that of matrix factorisation (or as it is, without), over shots."""
    fig, ax = plt.subplots(figsize=(9.5, 6.0))
    drawn: list[Mapping[str, Any]] = []
    relative = any(line["method"] == "factors" for line in lines)
    for method, (label, color, marker) in BASELINES.items():
        of = [line for line in lines if line["method"] == method]
        drawn += _curve(ax, of, relative, 0.91, label=label, color=color, marker=marker)
    for number, (method, kind) in enumerate(SHOWN, 1):
        of = [line for line in lines if (line["method"], line["finetune"]) == (method, kind)]
        drawn += _curve(
            ax,
            of,
            relative,
            1 + 0.03 * (number - 3),
            markerfacecolor="white" if kind == "user-bias" else None,
            label=f"{plotting.LABELS[method]}, {SHORT[kind]}",
            color=plotting.COLORS[method],
            marker=plotting.MARKERS[method],
            linestyle=DASHES[kind],
        )
    places = sorted({int(line["shots"]) for line in drawn})
    ax.set_xscale("log")
    ax.set_xticks(places, [str(shots) for shots in places], minor=False)
    ax.minorticks_off()
    ax.set_xlabel("ratings of an unseen user to fine-tune on")
    ax.set_ylabel("RMSE less that of matrix factorisation" if relative else "RMSE")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=12)
    trials = max(line["trials"] for line in lines)
    fig.suptitle(f"Unseen users, {trials} trials (bars: 95 % interval)" if relative else "")
    return plotting.save(fig, run, "rmse", _plain(drawn))


def _curve(ax: Axes, lines: Lines, relative: bool, shift: float, **look: Any) -> Lines:
    """Draws a line over shots, times ``shift`` so that no bar hides another; returns its lines."""
    name = f"{RMSE}_vs_factors"
    if relative and any(line["method"] == "factors" for line in lines):
        ax.axhline(0, color=look["color"], label=look["label"], linewidth=1.6)
        return lines
    shown = [line for line in lines if not relative or line[name] is not None]
    if not shown:
        return []
    x = [shift * int(line["shots"]) for line in shown]
    if relative:
        _with_intervals(ax, x, [line[name] for line in shown], **look)
    else:
        ax.plot(x, [line[RMSE] for line in shown], **look)
    return shown


def _with_intervals(ax: Axes, x: Sequence[float], found: Sequence[Comparison], **look: Any) -> None:
    """Draws differences with their intervals."""
    low, high = ([0 if math.isnan(d) else d for d in of] for of in _sides(found))
    ax.errorbar(x, [f.difference for f in found], yerr=[low, high], capsize=4, **look)


def _sides(found: Sequence[Comparison]) -> tuple[list[float], list[float]]:
    return [f.difference - f.low for f in found], [f.high - f.difference for f in found]


def _over_tasks(run: RunFiles, lines: Lines) -> Path:
    return _differences(run, lines, "tasks", "retraining users", "tasks")


def _over_ranks(run: RunFiles, lines: Lines) -> Path:
    of_lora = [line for line in lines if line["finetune"] == "lora"]
    return _differences(run, of_lora, "rank", "rank of LoRA", "rank")


def _differences(run: RunFiles, lines: Lines, name: str, label: str, file: str) -> Path:
    """Draws RMSE less standard retraining's over a setting, a panel per number of shots."""
    reference = f"{RMSE}_vs_standard"
    pairs = [("lora-ml", "lora"), ("last-layer-ml", "last-layer")]
    shown = [
        line
        for line in lines
        if (line["method"], line["finetune"]) in pairs and line[reference] is not None
    ]
    shots = list(dict.fromkeys(line["shots"] for line in shown))
    fig, axes = plt.subplots(
        1,
        max(1, len(shots)),
        figsize=(1.5 + 4.2 * max(1, len(shots)), 4.8),
        sharey=True,
        squeeze=False,
    )
    for ax, few in zip(axes[0], shots, strict=False):
        ax.axhline(0, color=plotting.COLORS["standard"], label="Standard, same fine-tuning")
        of = [line for line in shown if line["shots"] == few]
        values = sorted({int(line[name]) for line in of})
        for number, (method, kind) in enumerate(pairs):
            curve = [line for line in of if line["method"] == method]
            if curve:
                _with_intervals(
                    ax,
                    [values.index(int(line[name])) + 0.08 * number for line in curve],
                    [line[reference] for line in curve],
                    label=f"{plotting.LABELS[method]}, {SHORT[kind]}",
                    color=plotting.COLORS[method],
                    marker=plotting.MARKERS[method],
                )
        ax.set_xticks(range(len(values)), [str(value) for value in values])
        ax.set_title(f"{few} shots")
        ax.set_xlabel(label)
    axes[0][0].set_ylabel("RMSE less standard's")
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, file, _plain(shown))


def _plain(lines: Lines) -> list[dict[str, Any]]:
    """Returns lines for a csv file, with each comparison in columns of its own."""
    plain = []
    for line in lines:
        flat: dict[str, Any] = {}
        for name, value in line.items():
            if name.startswith(f"{RMSE}_vs_"):
                for part in ("difference", "low", "high", "ahead"):
                    flat[f"{name}_{part}"] = getattr(value, part, "")
            else:
                flat[name] = value
        plain.append(flat)
    return plain
