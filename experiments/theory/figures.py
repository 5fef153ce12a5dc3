"""Figures of the theory's statements 2, 8, 10, 11 and 12."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator

from experiments.lib import plotting
from experiments.lib.plotting import BLUE, GREEN, GREY, ORANGE, PINK
from experiments.lib.runs import RunFiles
from experiments.theory.checks import Outcome
from metalora.linear.theory import expected_finetune_error, expected_standard_loss

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE = (13.3, 6)
_ROUNDING = 1e-15  # relative to the energy that the trainers' losses are differences of


def draw(outcomes: Mapping[str, Outcome], folder: RunFiles) -> list[Path]:
    """Draws the figures of those statements that were checked; returns the paths of the PNGs."""
    plotting.style()
    plt.rcParams["pdf.fonttype"] = 3  # embedding whole fonts takes longer than most statements
    drawn = []
    for name, figure in _FIGURES.items():
        if name in outcomes:
            data = outcomes[name].data
            assert data is not None
            drawn.append(figure(data, folder))
    return drawn


def _standard_loss(data: dict[str, Any], folder: RunFiles) -> Path:
    fig, axis = plt.subplots(figsize=_SIZE)
    for rank, color, marker in ((1, BLUE, "o"), (2, ORANGE, "^")):
        points = [p for p in data["points"] if p["k"] == rank]
        tasks = np.arange(1, 21)
        dim = points[0]["d"]
        theory = [expected_standard_loss(int(t), dim, rank) for t in tasks]
        axis.plot(tasks, theory, color=color, label=f"½ (1 − 1/T) k d (d + 1), k = {rank}")
        _points(axis, points, "T", color, marker, f"measured, 99.99 % interval, k = {rank}")
        axis.axhline(rank * dim * (dim + 1) / 2, color=color, linestyle=":", linewidth=1.5)
    axis.set(xlabel="retraining tasks T", ylabel="mean loss at the optimum", ylim=(0, None))
    axis.set_xticks([1, 2, 3, 5, 10, 15, 20])
    axis.set_title("Standard retraining's loss grows with the number of tasks (d = 10)")
    axis.legend(loc="lower right")
    return plotting.save(fig, folder, "standard-loss", data["points"])


def _finetuning_error(data: dict[str, Any], folder: RunFiles) -> Path:
    fig, (left, right) = plt.subplots(1, 2, figsize=_SIZE)
    points = data["points"]
    for label, color, marker, tasks, rank in (
        ("LoRA-ML, T = 5, r = k", BLUE, "o", 5, 1),
        ("LoRA-ML, T = 2, r = 3k", GREEN, "s", 2, 3),
        ("standard, T = 3, r = k (T + 1)", ORANGE, "^", 3, 4),
        ("standard, T = 3, r = k", GREY, "x", 3, 1),
    ):
        found = [p for p in points if p["over"] == "samples" and p["tasks"] == tasks]
        found = [_in_units(p, p["noise"] ** 2) for p in found if p["finetune_rank"] == rank]
        _points(left, found, "samples", color, marker, label)
        if marker != "x":
            _theory(left, found, "samples", color)
    left.set(
        xscale="log", yscale="log", xlabel="fine-tuning samples n", ylabel="error ‖W − M‖² / σ²"
    )
    plotting.log_ticks(left.yaxis)
    left.set_xticks([250, 1000, 4000], ["250", "1,000", "4,000"])
    left.xaxis.set_minor_locator(NullLocator())
    left.set_title("exponent −1 in n, unless r is too small")
    left.legend(loc="center right", bbox_to_anchor=(1.0, 0.62))
    for method, label, color, marker in (
        ("standard", "standard, r = k (T + 1)", ORANGE, "^"),
        ("lora-ml", "LoRA-ML, r = k", BLUE, "o"),
    ):
        found = [p for p in points if p["over"] == "tasks" and p["method"] == method]
        # In units of σ² d / n, in which different d compare.
        scaled = [_in_units(p, p["noise"] ** 2 * p["dim"] / p["samples"]) for p in found]
        _points(right, scaled, "tasks", color, marker, label)
        _theory(right, scaled, "tasks", color)
    right.set(xlabel="retraining tasks T", ylabel="error n ‖W − M‖² / (σ² d)", ylim=(0, None))
    right.set_title("standard retraining gets worse with more tasks")
    right.legend(loc="upper left")
    fig.suptitle("Fine-tuning error; lines: σ² r (2d − r) / n", fontsize=18)
    return plotting.save(fig, folder, "finetuning-error", points)


def _hyperbola(data: dict[str, Any], folder: RunFiles) -> Path:
    fig, axis = plt.subplots(figsize=(9, 9.5))
    starts, ends = np.array(data["starts"]), np.array(data["ends"])
    b = np.linspace(-1.8, 1.8, 200)
    for sign in (1, -1):
        label = "x² − y² = 1: zero loss" if sign == 1 else None
        axis.plot(sign * np.cosh(b), np.sinh(b), color=ORANGE, zorder=1, label=label)
    for start, end in zip(starts, ends, strict=True):
        way = np.stack([start, end])
        axis.plot(way[:, 0], way[:, 1], color="#bbbbbb", linewidth=0.5, zorder=0)
    axis.scatter(starts[:, 0], starts[:, 1], s=8, color="#888888", label="random starts", zorder=2)
    axis.scatter(
        ends[:, 0], ends[:, 1], s=36, color=BLUE, label="where gradient descent ends", zorder=3
    )
    axis.scatter([1, -1], [0, 0], s=260, marker="*", color="black", label="truth ±e₁", zorder=4)
    axis.set(
        xlim=(-3, 3), ylim=(-2.6, 3.9), xlabel="first entry of U₁", ylabel="second entry of U₁"
    )
    axis.set_aspect("equal")
    axis.set_title("Two tasks do not determine the adapters (T = 2, k = 1)")
    axis.legend(loc="upper center", ncols=2)
    rows = [
        {"start_x": s[0], "start_y": s[1], "end_x": e[0], "end_y": e[1]}
        for s, e in zip(starts, ends, strict=True)
    ]
    return plotting.save(fig, folder, "hyperbola", rows)


def _spurious(data: dict[str, Any], folder: RunFiles) -> Path:
    fig, (left, right) = plt.subplots(1, 2, figsize=_SIZE)
    scale = data["relative_to"]
    share, along = np.array(data["path"]["share"]), np.array(data["path"]["loss"]) / scale
    floor = data["certificate"]["loss"] / scale
    left.plot(share, along, color=BLUE)
    left.scatter([0], [floor], s=130, color=ORANGE, zorder=3, label="spurious local minimum")
    left.scatter([1], [0], s=260, marker="*", color="black", zorder=3, label="truth: zero loss")
    left.axhline(floor, color=ORANGE, linestyle=":", linewidth=1.5)
    left.set(xlabel="position on the line from one to the other", ylabel="loss / Σ ‖M‖²")
    left.set_title("a barrier on the straight way to the truth")
    left.set_ylim(top=1.3 * along.max())
    left.legend(loc="upper right")
    rows = [{"series": "path", "x": x, "loss": y} for x, y in zip(share, along, strict=True)]
    steps = np.array(data["steps"])
    colors = {"from around it": ORANGE, "from random starts": GREY}
    for label, curves in reversed(list(data["descents"].items())):
        for index, curve in enumerate(np.array(curves) / scale):
            shown = None if index else f"gradient descent {label}"
            look = {"color": colors[label], "alpha": 0.8, "linewidth": 1.4}
            right.plot(steps, np.maximum(curve, 1e-12), label=shown, **look)
            rows += [
                {"series": f"{label} {index}", "x": x, "loss": y}
                for x, y in zip(steps, curve, strict=True)
            ]
    right.axhline(floor, color=ORANGE, linestyle=":", linewidth=1.5)
    right.set(xscale="log", yscale="log", xlabel="gradient step", ylabel="loss / Σ ‖M‖²")
    plotting.log_ticks(right.xaxis, right.yaxis)
    right.set_title("descent from around it stays")
    right.legend(loc="lower left")
    fig.suptitle(
        "Three tasks: a spurious local minimum for chosen truths (k = 1, d = 3)", fontsize=18
    )
    return plotting.save(fig, folder, "spurious-minimum", rows)


def _descent(data: dict[str, Any], folder: RunFiles) -> Path:
    fig, axis = plt.subplots(figsize=_SIZE)
    colors = (GREEN, BLUE, ORANGE, PINK)
    rows = []
    for curve, color, line in zip(data["curves"], colors, ("-", "--", "-.", ":"), strict=True):
        steps = curve["step"]
        low, median, high = (np.maximum(q, _ROUNDING) for q in curve["quantiles"])
        axis.fill_between(steps, low, high, color=color, alpha=0.15, linewidth=0)
        axis.plot(steps, median, color=color, linestyle=line, label=curve["at"])
        rows += [
            {"at": curve["at"], "step": s, "min": a, "median": m, "max": b}
            for s, a, m, b in zip(steps, low, median, high, strict=True)
        ]
    axis.axhline(1e-12, color="black", linestyle=":", linewidth=1.5)
    axis.set(xscale="log", yscale="log", xlabel="gradient step", ylabel="loss / Σ ‖M‖²")
    plotting.log_ticks(axis.xaxis, axis.yaxis)
    axis.set_title("Gradient descent from random starts reaches zero loss (median and full range)")
    axis.legend(loc="lower left")
    return plotting.save(fig, folder, "descent", rows)


def _points(
    axis: Axes, points: list[dict[str, Any]], over: str, color: str, marker: str, label: str
) -> None:
    mean = np.array([p["mean"] for p in points])
    bars = [mean - [p["low"] for p in points], np.array([p["high"] for p in points]) - mean]
    x = [p[over] for p in points]
    axis.errorbar(x, mean, bars, color=color, fmt=marker, capsize=4, label=label)


def _theory(axis: Axes, points: list[dict[str, Any]], over: str, color: str) -> None:
    """Draws the predicted error at the points' own settings."""
    predicted = [
        expected_finetune_error(p["dim"], p["finetune_rank"], p["noise"])
        / (p["samples"] * p["unit"])
        for p in points
    ]
    axis.plot([p[over] for p in points], predicted, color=color, linewidth=1.6)


def _in_units(point: dict[str, Any], unit: float) -> dict[str, Any]:
    return {**point, "unit": unit} | {k: point[k] / unit for k in ("mean", "low", "high")}


_FIGURES = {
    "2": _standard_loss,
    "8": _finetuning_error,
    "10": _hyperbola,
    "11": _spurious,
    "12": _descent,
}
