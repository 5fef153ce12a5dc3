"""Figures of a conflict run, from what its folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.conflict.settings import METHODS
from experiments.conflict.summary import best_finetuning, summary
from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFolder
from experiments.lib.statistics import Line

CHANGES = {
    "none": "Inputs unchanged",
    "views": "Turned, recoloured, inverted per task",
    "low-rank": "Low-rank map of patches per task",
    "patches": "Patches shuffled per task",
}


def draw(run: RunFolder) -> list[Path]:
    """Draws dial.png (accuracy over the dial) and shots.png (over shots), with their numbers."""
    rows = run.rows()
    lines = sorted(best_finetuning(rows), key=_order)
    if not lines:
        return []
    plotting.style()
    figures: list[Path] = []
    if len({line["turned"] for line in lines}) > 1:
        figures.append(_dial(run, lines))
    return [*figures, _shots(run, rows)]


def _dial(run: RunFolder, lines: list[Line]) -> Path:
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
        ax.set_xticks(range(len(shares)), [f"{100 * float(share):.0f} %" for share in shares])
        ax.set_xlabel("tasks with labels turned round")
        ax.set_title(CHANGES[kind])
    axes[0][0].set_ylabel(f"accuracy on unseen tasks (%),\n{middle} images each")
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, "dial", _numbers(lines))


def _shots(run: RunFolder, rows: list[dict[str, str]]) -> Path:
    """Draws accuracy over shots at the first setting of the dial, a panel per fine-tuning."""
    first = rows[0]["inputs"], rows[0]["turned"]
    lines = [line for line in summary(rows) if (line["inputs"], line["turned"]) == first]
    lines.sort(key=_order)
    fig, panels = accuracy_figures.panels(lines)
    shots = sorted({line["shots"] for line in lines}, key=int)
    for ax, _, of_kind in panels:
        accuracy_figures.over(ax, of_kind, "shots", shots, "value")
        ax.set_xlabel("images of an unseen task")
    panels[0][0].set_ylabel("accuracy on unseen tasks (%)")
    plotting.legend_below(fig, panels[0][0])
    fig.suptitle(
        f"{run.manifest['settings']['data']}: {CHANGES[first[0]].lower()}, labels turned round in "
        f"{100 * float(first[1]):.0f} % of the tasks; mean and standard error of "
        f"{accuracy_figures.trials_of(lines)}",
        fontsize=13,
    )
    return plotting.save(fig, run, "shots", _numbers(lines))


def _order(line: Line) -> int:
    return list(METHODS).index(line["method"])


def _numbers(lines: list[Line]) -> list[dict[str, Any]]:
    """Returns what a csv of the lines holds."""
    names = ("inputs", "turned", "method", "finetune", "shots", "trials", "value", "value_se")
    return [{name: line[name] for name in names} for line in lines]
