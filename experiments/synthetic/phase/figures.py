"""The phase diagrams as heat maps, with the regions in which theory promises recovery."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np

from experiments.lib import plotting
from experiments.lib.runs import RunFiles
from experiments.synthetic.phase.settings import RETRAIN_TASKS, PhaseSettings
from experiments.synthetic.phase.summary import UNFINISHED, Cells

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

LINE = plotting.COLORS["standard"]


def draw(settings: PhaseSettings, tasks: Cells, samples: Cells, folder: RunFiles) -> Path:
    """Draws both diagrams side by side.

    Returns:
        The path of the PNG file.
    """
    plotting.style()
    plt.rcParams.update({"axes.grid": False})
    shapes = [len(settings.tasks), len(settings.samples)]
    fig, axes = plt.subplots(1, 2, figsize=(16, 7), width_ratios=shapes)
    ranks = settings.ranks
    _panel(axes[0], settings.tasks, ranks, tasks)
    axes[0].set(xlabel="number of tasks, T")
    axes[0].set_title("Â = A* after retraining")
    _line(axes[0].axvline, settings.tasks, 3, "T ≥ 3")

    image = _panel(axes[1], settings.samples, ranks, samples)
    axes[1].set(xlabel="fine-tuning samples, n")
    axes[1].set_title(f"Â + UVᵀ = M after fine-tuning (T = {RETRAIN_TASKS})")
    _line(axes[1].axvline, settings.samples, settings.dim, "n ≥ d", linestyle=":")
    for axis in axes:
        axis.set_yticks(range(len(ranks)), [str(k) for k in ranks])
        axis.set_ylabel(f"adapter rank, k   (d = {settings.dim})")
        # The largest k with 3k ≤ d is the last below the line.
        _line(axis.axhline, ranks, settings.dim // 3 + 1, "3k ≤ d", linestyle="--")
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2, fontsize=13)

    fig.colorbar(image, ax=axes, label="recovered trials (%)", shrink=0.9, pad=0.01)
    fig.suptitle(
        f"Exact recovery by LoRA-ML: percent of {settings.trials} trials with relative error "
        f"≤ {settings.tolerance:g}     ({UNFINISHED}: some descents had not finished)",
        fontsize=17,
    )
    rows = [*_rows("T", tasks), *_rows("n", samples)]
    return plotting.save(fig, folder, "phase", rows)


def _panel(axis: Axes, columns: Sequence[int], ranks: Sequence[int], found: Cells) -> AxesImage:
    percent = np.array(
        [[100 * found[column, rank].success for column in columns] for rank in ranks]
    )
    image = axis.imshow(
        percent, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=100, interpolation="none"
    )
    axis.set_xticks(range(len(columns)), [str(column) for column in columns])
    size = 13 if max(percent.shape) <= 12 else 9
    for y, rank in enumerate(ranks):
        for x, column in enumerate(columns):
            cell = found[column, rank]
            text = f"{100 * cell.success:.0f}" + (UNFINISHED if cell.unfinished else "")
            color = "white" if cell.success > 0.6 else "black"
            axis.text(x, y, text, ha="center", va="center", color=color, fontsize=size)
    return image


def _line(draw_line: Any, ticks: Sequence[int], first: int, label: str, **style: Any) -> None:
    """Draws a line between the cells below ``first`` and those from it on."""
    draw_line(sum(t < first for t in ticks) - 0.5, color=LINE, linewidth=3, label=label, **style)


def _rows(diagram: str, found: Cells) -> list[dict[str, Any]]:
    return [
        {
            "vary": diagram,
            "setting": value,
            "k": rank,
            "success": cell.success,
            "unfinished": cell.unfinished,
        }
        for (value, rank), cell in found.items()
    ]
