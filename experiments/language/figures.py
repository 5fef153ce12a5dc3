"""Figures of a language run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.language.report import LAST, by_task, summary
from experiments.language.settings import FINETUNES
from experiments.lib.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(run: RunFolder, chance: float) -> list[Path]:
    """Draws accuracy.png (the table) and tasks.png (each test task), with their numbers.

    Args:
        run: a run of the experiment.
        chance: accuracy of a blind choice, in percent.
    """
    from experiments.lib import plotting

    lines = summary(run.rows())
    plotting.style()
    return [_accuracy(run, lines, chance), _tasks(run, by_task(run.rows()), chance)]


def _accuracy(run: RunFolder, lines: Sequence[Mapping[str, Any]], chance: float) -> Path:
    import matplotlib.pyplot as plt

    from experiments.lib import plotting

    kinds = [k for k in FINETUNES if any(line["finetune"] == k for line in lines)]
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(6.4 * len(kinds), 5.0), sharey=True, squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        of_kind = [line for line in lines if line["finetune"] == kind]
        if kind == "lora" and len({line["rank"] for line in of_kind}) > 1:
            _over_ranks(ax, of_kind)
            plotting.legend_below(fig, ax)
        else:
            _dots(ax, of_kind)
        _chance(ax, chance)
        ax.set_title(plotting.LABELS[kind])
    axes[0][0].set_ylabel("accuracy, 1 of 20 (%)" if chance == 5 else "accuracy (%)")
    trials = max(line["trials"] for line in lines)
    fig.suptitle(
        f"{run.rows()[0]['model']}, fine-tuned on unseen personas: last epoch, mean and standard "
        f"error of {trials} trial{'s' if trials > 1 else ''}",
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


def _dots(ax: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    from experiments.lib import plotting

    for place, line in enumerate(lines):
        error = line[f"{LAST}_se"]
        ax.errorbar(
            place,
            line[LAST],
            yerr=None if math.isnan(error) else error,
            fmt=plotting.MARKERS[line["method"]],
            color=plotting.COLORS[line["method"]],
            capsize=5,
        )
        ax.annotate(
            f"{line[LAST]:.1f}",
            (place, line[LAST]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            fontsize=12,
        )
    methods = [line["method"] for line in lines]
    names = [
        plotting.LABELS[m].replace("-Layer", "-\nLayer")
        + (f"\nrank {line['rank']}" if methods.count(m) > 1 else "")
        for m, line in zip(methods, lines, strict=True)
    ]
    ax.set_xticks(range(len(lines)), names)
    ax.set_xlim(-0.5, len(lines) - 0.3)
    ax.grid(axis="x", visible=False)


def _over_ranks(ax: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    from experiments.lib import plotting

    ranks = sorted({int(line["rank"]) for line in lines})
    methods = list(dict.fromkeys(line["method"] for line in lines))
    for number, method in enumerate(methods):
        of_method = sorted(
            (line for line in lines if line["method"] == method), key=lambda line: int(line["rank"])
        )
        ax.errorbar(
            # Side by side, so that no error bar hides another's.
            [
                ranks.index(int(line["rank"])) + 0.06 * (number - (len(methods) - 1) / 2)
                for line in of_method
            ],
            [line[LAST] for line in of_method],
            yerr=[
                0.0 if math.isnan(line[f"{LAST}_se"]) else line[f"{LAST}_se"] for line in of_method
            ],
            color=plotting.COLORS[method],
            marker=plotting.MARKERS[method],
            capsize=4,
            label=plotting.LABELS[method],
        )
    ax.set_xticks(range(len(ranks)), [str(r) for r in ranks])
    ax.set_xlabel("rank of LoRA")
    ax.grid(axis="x", visible=False)


def _tasks(run: RunFolder, lines: Sequence[Mapping[str, Any]], chance: float) -> Path:
    """Accuracy of every test task: a panel per fine-tuning and rank, a mark per method."""
    import matplotlib.pyplot as plt

    from experiments.lib import plotting

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
