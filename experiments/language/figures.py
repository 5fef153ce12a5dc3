"""Figures of a language run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt

from experiments.language.summary import LAST, by_task, summary
from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(run: RunFiles, chance: float) -> list[Path]:
    """Draws accuracy.png (the table) and tasks.png (each test task), with their numbers.

    Args:
        run: a run of the experiment.
        chance: accuracy of a blind choice, in percent.
    """
    plotting.style()
    return [
        _accuracy(run, summary(run.rows()), chance),
        _tasks(run, by_task(run.rows()), chance),
    ]


def _accuracy(run: RunFiles, lines: list[dict[str, Any]], chance: float) -> Path:
    fig, panels = accuracy_figures.panels(lines)
    for ax, kind, of_kind in panels:
        ranks = sorted({line["rank"] for line in of_kind}, key=lambda rank: int(rank or 0))
        if kind == "lora" and len(ranks) > 1:
            accuracy_figures.over(ax, of_kind, "rank", ranks, LAST)
            ax.set_xlabel("rank of LoRA")
            plotting.legend_below(fig, ax)
        else:
            methods = [line["method"] for line in of_kind]
            names = [
                plotting.LABELS[method]
                + (f"\nrank {line['rank']}" if methods.count(method) > 1 else "")
                for method, line in zip(methods, of_kind, strict=True)
            ]
            accuracy_figures.dots(ax, of_kind, names, LAST)
        _chance(ax, chance)
    panels[0][0].set_ylabel(f"accuracy among {100 / chance:.0f} candidates (%)")
    fig.suptitle(
        f"{run.rows()[0]['model']}, fine-tuned on unseen personas: last epoch,\n"
        f"{accuracy_figures.shown_of(lines)}",
        fontsize=13,
    )
    return plotting.save(fig, run, "accuracy", lines)


def _chance(ax: Axes, chance: float) -> None:
    ax.axhline(chance, color="black", linestyle=":", linewidth=1.6)
    ax.annotate(
        "chance",
        (1, chance),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=12,
    )
    ax.set_ylim(bottom=0)


def _tasks(run: RunFiles, lines: Sequence[dict[str, Any]], chance: float) -> Path:
    """Draws accuracy of every test task: a panel per fine-tuning and rank, a mark per method."""
    panels = list(dict.fromkeys((line["finetune"], line["rank"]) for line in lines))
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(11, 1.2 + 3.4 * len(panels)), sharex=True, squeeze=False
    )
    for ax, (kind, rank) in zip(axes[:, 0], panels, strict=True):
        of_panel = [line for line in lines if (line["finetune"], line["rank"]) == (kind, rank)]
        methods = list(dict.fromkeys(line["method"] for line in of_panel))
        for number, method in enumerate(methods):
            of_method = {line["task"]: line[LAST] for line in of_panel if line["method"] == method}
            ax.plot(
                [i + 0.1 * (number - (len(methods) - 1) / 2) for i in range(len(tasks))],
                [of_method[task] for task in tasks],
                linestyle="",
                marker=plotting.MARKERS[method],
                color=plotting.COLORS[method],
                label=plotting.LABELS[method],
                clip_on=False,
            )
        _chance(ax, chance)
        ax.set_title(plotting.LABELS[kind] + (f", rank {rank}" if rank else ""))
        ax.set_ylabel("accuracy (%)")
        ax.grid(axis="x", visible=False)
        ax.legend(fontsize=11, loc="center left", bbox_to_anchor=(1.08, 0.5))
    axes[-1][0].set_xticks(range(len(tasks)), tasks)
    axes[-1][0].set_xlabel("test task (persona cluster)")
    return plotting.save(fig, run, "tasks", lines)
