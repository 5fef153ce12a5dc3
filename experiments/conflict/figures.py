"""Figures of a conflict run, from what its folder holds."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.conflict.summary import RETRAINING, best_finetuning, summary
from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Line

PAIRS = {"consistent": "Consistent pairs", "all": "All pairs of classes"}
CHANGES = {
    "none": "images as they are",
    "views": "rotated, recoloured, inverted per task",
    "low-rank": "a low-rank map of patches per task",
    "patches": "patches shuffled per task",
}


def draw(run: RunFiles) -> list[Path]:
    """Draws dial.png (accuracy over flipped labels), inputs.png and shots.png, with their numbers.

    The first two are drawn where there are several shares of flipped labels, or changes of inputs.
    """
    rows = list(run.rows())
    lines = best_finetuning(rows)
    if not lines:
        return []
    plotting.style()
    figures: list[Path] = []
    if len({line["flipped"] for line in lines}) > 1:
        figures.append(_dial(run, lines))
    if len({line["inputs"] for line in lines}) > 1:
        figures.append(_inputs(run, summary(rows, RETRAINING), lines))
    return [*figures, _shots(run, lines)]


def _dial(run: RunFiles, lines: list[Line]) -> Path:
    """Draws accuracy over the share of flipped labels, a panel for each pairs and inputs."""
    shots = [str(n) for n in run.manifest["settings"]["shots"]]
    fewest = min(shots, key=int)
    lines = [line for line in lines if line["shots"] == fewest]
    shares = sorted({line["flipped"] for line in lines}, key=float)
    found = {_panel(line) for line in lines}
    kinds = [(pairs, inputs) for pairs in PAIRS for inputs in CHANGES if (pairs, inputs) in found]
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(max(9.6, 1.2 + 5.4 * len(kinds)), 5.8), sharey=True, squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        of_kind = [line for line in lines if _panel(line) == kind]
        accuracy_figures.over(ax, of_kind, "flipped", shares, "value")
        ax.set_xticks(range(len(shares)), [_percent(share) for share in shares])
        ax.set_xlabel("tasks with flipped labels")
        if len(kinds) > 1:
            ax.set_title("\n".join(_titles(kind)))
    axes[0][0].set_ylabel("accuracy on unseen tasks (%)")
    fig.suptitle(
        f"{fewest} images of each unseen task; {accuracy_figures.shown_of(lines)}",
        fontsize=14,
    )
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, "dial", _numbers(lines))


def _inputs(run: RunFiles, retrained: list[Line], lines: list[Line]) -> Path:
    """Draws accuracy for each change of inputs, on the retraining tasks and on unseen ones.

    At the first setting of pairs and flipped labels, and with the fewest shots.
    """
    fewest = min((line["shots"] for line in lines), key=int)
    lines = [line for line in lines if line["shots"] == fewest]
    setting = lines[0]["pairs"], lines[0]["flipped"]
    of_setting = [
        [line for line in part if (line["pairs"], line["flipped"]) == setting]
        for part in (retrained, lines)
    ]
    kinds = [kind for kind in CHANGES if any(line["inputs"] == kind for line in lines)]
    names = [textwrap.fill(CHANGES[kind], 18) for kind in kinds]
    fig, axes = plt.subplots(1, 2, figsize=(13.2, 5.8), sharey=True)
    titles = "retraining tasks, held out", f"unseen tasks, {fewest} images of each"
    for ax, part, title in zip(axes, of_setting, titles, strict=True):
        accuracy_figures.over(ax, part, "inputs", kinds, "value", joined=False)
        ax.set_xticks(range(len(kinds)), names)
        ax.set_title(title)
    axes[0].set_ylabel("accuracy (%)")
    fig.suptitle(
        f"{PAIRS[setting[0]]}, labels flipped in {_percent(setting[1])} of the tasks; "
        f"{accuracy_figures.shown_of(lines)}",
        fontsize=14,
    )
    plotting.legend_below(fig, axes[0])
    return plotting.save(fig, run, "inputs", [n for part in of_setting for n in _numbers(part)])


def _shots(run: RunFiles, lines: list[Line]) -> Path:
    """Draws accuracy after fine-tuning over shots, at the first setting of the dial."""
    panel, flipped = _panel(lines[0]), lines[0]["flipped"]
    lines = [line for line in lines if (_panel(line), line["flipped"]) == (panel, flipped)]
    shots = sorted({line["shots"] for line in lines}, key=int)
    fig, ax = plt.subplots(figsize=(9.6, 5.4))
    accuracy_figures.over(ax, lines, "shots", shots, "value")
    ax.set_xlabel("images of an unseen task to fine-tune on")
    ax.set_ylabel("accuracy on unseen tasks (%)")
    fig.suptitle(
        f"{', '.join(_titles(panel))}, labels flipped in {_percent(flipped)} of the tasks\n"
        f"({accuracy_figures.shown_of(lines)})",
        fontsize=14,
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return plotting.save(fig, run, "shots", _numbers(lines))


def _panel(line: Line) -> tuple[str, str]:
    return line["pairs"], line["inputs"]


def _titles(panel: tuple[str, str]) -> tuple[str, str]:
    return PAIRS[panel[0]], CHANGES[panel[1]]


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


def _numbers(lines: list[Line]) -> list[dict[str, Any]]:
    """Returns what a csv of the lines holds."""
    names = (
        "pairs",
        "inputs",
        "flipped",
        "method",
        "finetune",
        "shots",
        "trials",
        "value",
        "value_se",
    )
    return [{name: line[name] for name in names} for line in lines]
