"""Figures of a vision run, from what its folder holds."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFolder
from experiments.lib.statistics import summarize
from experiments.vision.summary import BEST, LAST, summary


def draw(run: RunFolder) -> list[Path]:
    """Draws accuracy.png (the table) and curves.png (accuracy during fine-tuning), with numbers."""
    lines = summary(run.rows())
    if not lines:
        return []
    plotting.style()
    return [_accuracy(run, lines), _curves(run)]


def _accuracy(run: RunFolder, lines: list[dict[str, Any]]) -> Path:
    shots = list(dict.fromkeys(line["shots"] for line in lines))
    fig, panels = accuracy_figures.panels(lines)
    for ax, _, of_kind in panels:
        if len(shots) > 1:
            accuracy_figures.over(ax, of_kind, "shots", shots, BEST)
            ax.set_xlabel("images of the test task")
        else:
            names = [plotting.LABELS[line["method"]] for line in of_kind]
            accuracy_figures.dots(ax, of_kind, names, BEST, LAST)
    if len(shots) > 1:
        plotting.legend_below(fig, panels[0][0])
    panels[0][0].set_ylabel("held-out accuracy (%)")
    images = f"{shots[0]} images" if len(shots) == 1 else "few images"
    what = "best epoch" if len(shots) > 1 else "filled: best epoch, hollow: last epoch"
    fig.suptitle(
        f"{run.manifest['settings']['data']}: fine-tuned on {images} of the test task; mean and "
        f"standard error of {accuracy_figures.trials_of(lines)} ({what})",
        fontsize=13,
    )
    return plotting.save(fig, run, "accuracy", lines)


def _curves(run: RunFolder) -> Path:
    """Draws accuracy during fine-tuning, mean over trials; a row of panels per number of shots."""
    settings = run.manifest["settings"]
    kinds, shots = settings["finetune"], settings["shots"]
    rows = [
        {**r, "metric": "accuracy", "value": r["validation"]}
        for r in run.records()
        if r.get("phase") == "finetune"
    ]
    numbers = summarize(rows, ("method", "finetune", "shots", "epoch"), ("accuracy",), scale=100)
    fig, axes = plt.subplots(
        len(shots),
        len(kinds),
        figsize=(6.2 * len(kinds), 1.0 + 3.8 * len(shots)),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for line, few in zip(axes, shots, strict=True):
        for ax, kind in zip(line, kinds, strict=True):
            for method in settings["retrain"]:
                wanted = {"method": method, "finetune": kind, "shots": few}
                points = [n for n in numbers if wanted.items() <= n.items()]
                epochs = [n["epoch"] + 1 for n in points]
                color = plotting.COLORS[method]
                ax.plot(
                    epochs,
                    [n["accuracy"] for n in points],
                    color=color,
                    marker=plotting.MARKERS[method] if len(epochs) <= 12 else None,
                    markersize=6,
                    label=plotting.LABELS[method],
                )
                if points and not math.isnan(points[0]["accuracy_se"]):
                    low = [n["accuracy"] - n["accuracy_se"] for n in points]
                    high = [n["accuracy"] + n["accuracy_se"] for n in points]
                    ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
            ax.set_title(f"{plotting.LABELS[kind]}, {few} images", fontsize=14)
        line[0].set_ylabel("held-out accuracy (%)")
    for ax in axes[-1]:
        ax.set_xlabel("epoch of fine-tuning")
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, "curves", numbers)
