"""Figures of a conflict run, from what its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.conflict.summary import best_finetuning
from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Line

CHANGES = {
    "none": "Inputs unchanged",
    "views": "Rotated, recoloured, inverted per task",
    "low-rank": "Low-rank map of patches per task",
    "patches": "Patches shuffled per task",
}


def draw(run: RunFiles) -> list[Path]:
    """Draws dial.png (accuracy over the dial) and shots.png (over shots), with their numbers."""
    lines = best_finetuning(run.rows())
    if not lines:
        return []
    plotting.style()
    figures: list[Path] = []
    if len({line["turned"] for line in lines}) > 1:
        figures.append(_dial(run, lines))
    return [*figures, _shots(run, lines)]


def _dial(run: RunFiles, lines: list[Line]) -> Path:
    """Draws accuracy after fine-tuning over the share of turned labels, a panel per inputs."""
    shots = [str(n) for n in run.manifest["settings"]["shots"]]
    middle = shots[len(shots) // 2]
    lines = [line for line in lines if line["shots"] == middle]
    shares = sorted({line["turned"] for line in lines}, key=float)
    kinds = [kind for kind in CHANGES if any(line["inputs"] == kind for line in lines)]
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(1.2 + 5.4 * len(kinds), 5.6), sharey=True, squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        of_kind = [line for line in lines if line["inputs"] == kind]
        accuracy_figures.over(ax, of_kind, "turned", shares, "value")
        ax.set_xticks(range(len(shares)), [_percent(share) for share in shares])
        ax.set_xlabel("tasks with labels turned round")
        ax.set_title(CHANGES[kind])
    axes[0][0].set_ylabel(f"accuracy on unseen tasks (%),\n{middle} images each")
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, "dial", _numbers(lines))


def _shots(run: RunFiles, lines: list[Line]) -> Path:
    """Draws accuracy after fine-tuning over shots, at the first setting of the dial."""
    inputs, turned = lines[0]["inputs"], lines[0]["turned"]
    lines = [line for line in lines if (line["inputs"], line["turned"]) == (inputs, turned)]
    shots = sorted({line["shots"] for line in lines}, key=int)
    fig, ax = plt.subplots(figsize=(9.6, 5.4))
    accuracy_figures.over(ax, lines, "shots", shots, "value")
    ax.set_xlabel("images of an unseen task to fine-tune on")
    ax.set_ylabel("accuracy on unseen tasks (%)")
    fig.suptitle(
        f"{CHANGES[inputs]}, labels turned round in {_percent(turned)} of the tasks\n"
        f"(mean and standard error of {accuracy_figures.trials_of(lines)})",
        fontsize=14,
    )
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right center")
    return plotting.save(fig, run, "shots", _numbers(lines))


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f} %"


def _numbers(lines: list[Line]) -> list[dict[str, Any]]:
    """Returns what a csv of the lines holds."""
    names = ("inputs", "turned", "method", "finetune", "shots", "trials", "value", "value_se")
    return [{name: line[name] for name in names} for line in lines]
