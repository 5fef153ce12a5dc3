"""Figures of a ratings run, from what its folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from experiments.lib import plotting
from experiments.lib.accuracy_figures import trials_of
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Comparison
from experiments.ratings.summary import PAIRS, RMSE, overlap_of, summary

Lines = Sequence[Mapping[str, Any]]
SHORT = {"lora": "LoRA", "last-layer": "last layer"}
# The lines of the figure over shots: each method with the fine-tuning that it is made for, and each
# with a last layer per user.
SHOWN: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("last-layer-ml", "last-layer"): {"color": plotting.GREEN, "marker": "s", "linestyle": "-"},
    ("lora-ml", "lora"): {"color": plotting.BLUE, "marker": "o", "linestyle": "-"},
    ("lora-ml", "last-layer"): {
        "color": plotting.SKY,
        "marker": "D",
        "linestyle": "--",
        "markerfacecolor": "white",
    },
    ("standard", "last-layer"): {"color": plotting.ORANGE, "marker": "^", "linestyle": ":"},
}


def draw(run: RunFiles) -> list[Path]:
    """Draws rmse.png (over shots), tasks.png and rank.png (over several), with their numbers."""
    lines = summary(run.rows(), overlap_of(run))
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
    """Draws the RMSE minus matrix factorisation's over shots, or without that the RMSE itself."""
    fig, ax = plt.subplots(figsize=(9.5, 5.6))
    drawn = [line for line in lines if line["method"] == "factors"]
    relative = bool(drawn)
    if relative:
        ax.axhline(0, color="black", linewidth=1.6, label="Matrix factorisation")
    for number, ((method, kind), look) in enumerate(SHOWN.items()):
        of = [line for line in lines if (line["method"], line["finetune"]) == (method, kind)]
        shift = 1 + 0.05 * (number - 1.5)  # so that no bar hides another
        x = [shift * int(line["shots"]) for line in of]
        look = {**look, "label": f"{plotting.LABELS[method]}, {SHORT[kind]}"}
        if of and relative:
            _with_intervals(ax, x, [line[f"{RMSE}_vs_factors"] for line in of], **look)
        elif of:
            ax.plot(x, [line[RMSE] for line in of], **look)
        drawn += of
    places = sorted({int(line["shots"]) for line in drawn})
    ax.set_xscale("log")
    ax.set_xticks(places, [str(shots) for shots in places], minor=False)
    ax.minorticks_off()
    ax.set_xlabel("ratings of an unseen user to fine-tune on")
    less = "RMSE minus matrix factorisation's\n(below 0 is better)"
    ax.set_ylabel(less if relative else "RMSE")
    fig.suptitle(_title(run, lines, f"{RMSE}_vs_factors", "95 % interval"))
    plotting.legend_below(fig, ax)
    return plotting.save(fig, run, "rmse", _plain(drawn))


def _with_intervals(ax: Axes, x: Sequence[float], found: Sequence[Comparison], **look: Any) -> None:
    """Draws differences with their intervals, and without a bar where the interval is unknown."""
    sizes = [f.high - f.difference for f in found]  # NaN draws no bar
    known = not all(map(math.isnan, sizes))
    y = [f.difference for f in found]
    ax.errorbar(x, y, yerr=sizes if known else None, capsize=4, **look)


def _title(run: RunFiles, lines: Lines, name: str, bars: str) -> str:
    """Returns what was measured on whom, and what the bars are if there are any.

    Args:
        name: of the comparison that is drawn.
        bars: what they are.
    """
    settings = run.manifest["settings"]
    ratings = "Made-up ratings" if settings["smoke"] else "MovieLens"
    users = settings["test_users" if settings["users"] == "test" else "validation_users"]
    found = [line[name] for line in lines if line[name] is not None]
    drawn = f" ({bars})" if any(not math.isnan(f.low) for f in found) else ""
    return f"{ratings}: {users} unseen users, {trials_of(lines)}{drawn}"


def _over_tasks(run: RunFiles, lines: Lines) -> Path:
    return _differences(run, lines, "tasks", "retraining users", "tasks")


def _over_ranks(run: RunFiles, lines: Lines) -> Path:
    of_lora = [line for line in lines if line["finetune"] == "lora"]
    return _differences(run, of_lora, "rank", "rank of LoRA", "rank")


def _differences(run: RunFiles, lines: Lines, name: str, label: str, file: str) -> Path:
    """Draws the RMSE minus standard retraining's over a setting, a panel per number of shots."""
    reference = f"{RMSE}_vs_standard"
    shown = [
        line
        for line in lines
        if (line["method"], line["finetune"]) in PAIRS and line[reference] is not None
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
        for number, (method, kind) in enumerate(PAIRS):
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
        ax.set_title(f"{few} ratings")
        ax.set_xlabel(label)
    axes[0][0].set_ylabel("RMSE minus standard's\n(below 0 is better)")
    fig.suptitle(_title(run, shown or lines, reference, "bars: 95 % interval"))
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
