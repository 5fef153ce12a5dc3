"""Figures of a text run, from what its folder holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.lib import accuracy_figures, plotting
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Line
from experiments.text.summary import BITS, by_task, summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(run: RunFiles) -> list[Path]:
    """Draws bits.png (over the amount of text) and tasks.png (each test task), with numbers."""
    lines = [line for line in summary(run.rows(), BITS) if line["finetune"]]
    if not lines:
        return []
    plotting.style()
    return [_bits(run, lines), _tasks(run, by_task(run.rows()))]


def _bits(run: RunFiles, lines: Sequence[Line]) -> Path:
    amounts = sorted({line["amount"] for line in lines}, key=float)
    fig, panels = accuracy_figures.panels(lines)
    for ax, _, of_kind in panels:
        retrained = [line for line in of_kind if line["method"] != "none"]
        accuracy_figures.over(ax, retrained, "amount", amounts, "value")
        _note(ax, [line for line in of_kind if line["method"] == "none"])
        ax.set_xlabel("kB of text of an unseen task")
    panels[0][0].set_ylabel("bits per byte of held-out text")
    plotting.legend_below(fig, panels[0][0])
    fig.suptitle(
        f"Adapted to unseen tasks; {accuracy_figures.shown_of(lines)}",
        fontsize=13,
    )
    names = ("method", "finetune", "amount", "trials", "value", "value_se")
    return plotting.save(fig, run, "bits", [{n: line[n] for n in names} for line in lines])


def _note(ax: Axes, lines: accuracy_figures.Lines) -> None:
    """Writes the bits of the model that was not retrained, which are far above the others'."""
    if not lines:
        return
    least, most = (f(float(line["value"]) for line in lines) for f in (min, max))
    ax.annotate(
        f"not retrained, off the scale: {least:.1f} to {most:.1f}",
        (0.98, 0.98),
        xycoords="axes fraction",
        ha="right",
        va="top",
        fontsize=12,
        color=plotting.COLORS["none"],
    )


def _tasks(run: RunFiles, lines: Sequence[Line]) -> Path:
    """Draws bits of every test task with the most text: a panel per fine-tuning."""
    fig, panels = accuracy_figures.panels([*lines])
    tasks = list(dict.fromkeys(line["task"] for line in lines))
    for ax, _, of_kind in panels:
        accuracy_figures.over(ax, of_kind, "task", tasks, BITS)
        for drawn in ax.get_lines():
            drawn.set_linestyle("")
        ax.set_xlabel("unseen task")
    panels[0][0].set_ylabel("bits per byte of held-out text")
    plotting.legend_below(fig, panels[0][0])
    amount = f"{float(lines[0]['amount']):g} kB of text"
    fig.suptitle(f"Each unseen task after adapting to {amount}", fontsize=13)
    names = ("method", "finetune", "task", "amount", "trials", BITS, f"{BITS}_se")
    return plotting.save(fig, run, "tasks", [{n: line[n] for n in names} for line in lines])
