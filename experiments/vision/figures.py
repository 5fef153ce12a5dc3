"""Figures of a vision run, from what its folder holds."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import summarize
from experiments.vision.summary import BEST, LAST, number, summary

TITLES = {"cifar10": "CIFAR-10", "cifar10-16": "CIFAR-10, 16 × 16", "digits": "Digits, 8 × 8"}


def draw(run: RunFiles) -> list[Path]:
    """Draws accuracy.png (the table) and curves.png (accuracy during fine-tuning), with numbers.

    There are no curves where accuracy was measured after the last epoch alone, and no figures of
    several rates.
    """
    settings = run.manifest["settings"]
    if not summary(run.rows()) or settings["finetune_lrs"]:
        return []
    during = settings["evaluate_every"] < settings["finetune_epochs"]
    return [draw_accuracy(run), *([_curves(run)] if during else [])]


def draw_accuracy(run: RunFiles) -> Path:
    """Draws the table: a panel for each fine-tuning, over the number of shots if there are more."""
    plotting.style()
    lines = summary(run.rows())
    shots = sorted(dict.fromkeys(line["shots"] for line in lines), key=number)
    metrics = [LAST] if math.isnan(lines[0][BEST]) else [LAST, BEST]
    fig, panels = accuracy_figures.panels(lines)
    for ax, _, of_kind in panels:
        if len(shots) > 1:
            accuracy_figures.over(ax, of_kind, "shots", shots, LAST)
            ax.set_xlabel("images of the test task")
        else:
            names = [plotting.LABELS[line["method"]] for line in of_kind]
            accuracy_figures.dots(ax, of_kind, names, *metrics)
    if len(shots) > 1:
        plotting.legend_below(fig, panels[0][0])
    panels[0][0].set_ylabel("held-out accuracy (%)")
    images = f"{shots[0]} images" if len(shots) == 1 else "few images"
    what = "last epoch"
    if len(shots) == 1 and len(metrics) > 1:
        what = "filled: last epoch, hollow: best epoch"
    fig.suptitle(
        f"{TITLES[run.manifest['settings']['data']]}: fine-tuned on {images} of the test task; "
        f"{accuracy_figures.shown_of(lines)} ({what})",
        fontsize=13,
    )
    return plotting.save(fig, run, "accuracy", lines)


def _curves(run: RunFiles) -> Path:
    """Draws accuracy during fine-tuning, mean over trials; a row of panels per number of shots."""
    settings = run.manifest["settings"]
    kinds, shots = settings["finetune"], sorted(settings["shots"], key=number)
    rows = [
        {**r, "metric": "accuracy", "value": r["validation"]}
        for r in run.records()
        if r.get("phase") == "finetune" and "validation" in r
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
