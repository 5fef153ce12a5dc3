"""Table and figures of a vision run, from what its folder holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.lib.runs import RunFolder, standard_error, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEST, LAST = "accuracy_best", "accuracy_last"


def row(
    data: str, method: str, finetune: str, shots: str, trial: int, metric: str, value: Any
) -> dict[str, Any]:
    """One measured value as results.csv has it; rows about retraining leave the fine-tuning out."""
    return {
        "experiment": "vision",
        "data": data,
        "method": method,
        "finetune": finetune,
        "shots": shots,
        "trial": trial,
        "metric": metric,
        "value": value,
    }


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Mean and standard error over trials, in percent, of both accuracies; in results' order.

    The standard error of one trial is NaN.
    """
    values: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for r in rows:
        if r["metric"] in (BEST, LAST):
            key = r["method"], r["finetune"], r["shots"]
            group = values.setdefault(key, {BEST: [], LAST: []})
            group[r["metric"]].append(100 * float(r["value"]))
    table = []
    for (method, finetune, shots), group in values.items():
        line: dict[str, Any] = {"method": method, "finetune": finetune, "shots": shots}
        line["trials"] = len(group[BEST])
        for metric, found in group.items():
            line[metric] = statistics.fmean(found)
            line[f"{metric}_se"] = standard_error(found)
        table.append(line)
    return table


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """The summary as text: accuracy in percent, with its standard error in brackets."""
    text = [
        f"{'retraining':<14} {'fine-tuning':<11} {'shots':>5} {'trials':>6} "
        f"{'best epoch':>14} {'last epoch':>14}"
    ]
    for line in lines:
        best, last = (with_error(line[m], line[f"{m}_se"]) for m in (BEST, LAST))
        text.append(
            f"{line['method']:<14} {line['finetune']:<11} {line['shots']:>5} {line['trials']:>6} "
            f"{best:>14} {last:>14}"
        )
    text.append("held-out accuracy of the test task in %, mean (standard error) over trials")
    return "\n".join(text)


def figures(run: RunFolder) -> list[Path]:
    """Draws accuracy.png (the table) and curves.png (accuracy during fine-tuning), with numbers."""
    from experiments.lib import plotting

    lines = summary(run.rows())
    if not lines:
        return []
    plotting.style()
    return [_accuracy(run, lines), _curves(run)]


def _accuracy(run: RunFolder, lines: Sequence[Mapping[str, Any]]) -> Path:
    import matplotlib.pyplot as plt

    from experiments.lib import plotting

    kinds = list(dict.fromkeys(line["finetune"] for line in lines))
    shots = list(dict.fromkeys(line["shots"] for line in lines))
    fig, axes = plt.subplots(
        1, len(kinds), figsize=(6.2 * len(kinds), 4.8), sharey=True, squeeze=False
    )
    for ax, kind in zip(axes[0], kinds, strict=True):
        of_kind = [line for line in lines if line["finetune"] == kind]
        if len(shots) > 1:
            _lines_over_shots(ax, of_kind, shots)
        else:
            _dots(ax, of_kind)
        ax.set_title(plotting.LABELS[kind])
    if len(shots) > 1:
        plotting.legend_below(fig, axes[0][0])
    axes[0][0].set_ylabel("held-out accuracy (%)")
    trials = max(line["trials"] for line in lines)
    data = run.manifest["settings"]["data"]
    images = f"{shots[0]} images" if len(shots) == 1 else "few images"
    what = "best epoch" if len(shots) > 1 else "filled: best epoch, hollow: last epoch"
    fig.suptitle(
        f"{data}: fine-tuned on {images} of the test task; mean and standard error of "
        f"{trials} trial{'s' if trials > 1 else ''} ({what})",
        fontsize=13,
    )
    return plotting.save(fig, run, "accuracy", lines)


def _dots(ax: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
    from experiments.lib import plotting

    for place, line in enumerate(lines):
        color, marker = plotting.COLORS[line["method"]], plotting.MARKERS[line["method"]]
        for metric, shift, face in ((BEST, -0.1, color), (LAST, 0.1, "white")):
            error = line[f"{metric}_se"]
            ax.errorbar(
                place + shift,
                line[metric],
                yerr=None if math.isnan(error) else error,
                fmt=marker,
                color=color,
                markerfacecolor=face,
                markeredgewidth=2,
                capsize=5,
            )
        ax.annotate(
            f"{line[BEST]:.1f}",
            (place - 0.1, line[BEST]),
            xytext=(-9, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=12,
        )
    names = [
        plotting.LABELS[line["method"]].replace("Last-Layer", "Last-\nLayer") for line in lines
    ]
    ax.set_xticks(range(len(lines)), names)
    ax.set_xlim(-0.6, len(lines) - 0.4)
    ax.grid(axis="x", visible=False)


def _lines_over_shots(ax: Axes, lines: Sequence[Mapping[str, Any]], shots: Sequence[str]) -> None:
    from experiments.lib import plotting

    methods = list(dict.fromkeys(line["method"] for line in lines))
    for number, method in enumerate(methods):
        of_method = {line["shots"]: line for line in lines if line["method"] == method}
        places = [i for i, s in enumerate(shots) if s in of_method]
        means = [of_method[shots[i]][BEST] for i in places]
        errors = [of_method[shots[i]][f"{BEST}_se"] for i in places]
        ax.errorbar(
            # Side by side, so that no error bar hides another's.
            [i + 0.06 * (number - (len(methods) - 1) / 2) for i in places],
            means,
            yerr=[0.0 if math.isnan(e) else e for e in errors],
            color=plotting.COLORS[method],
            marker=plotting.MARKERS[method],
            capsize=4,
            label=plotting.LABELS[method],
        )
    ax.set_xticks(range(len(shots)), shots)
    ax.set_xlim(-0.4, len(shots) - 0.6)
    ax.set_xlabel("images of the test task")
    ax.grid(axis="x", visible=False)


def _curves(run: RunFolder) -> Path:
    """Accuracy during fine-tuning, mean over trials, a row of panels for each number of shots."""
    import matplotlib.pyplot as plt

    from experiments.lib import plotting

    settings = run.manifest["settings"]
    kinds, shots = settings["finetune"], settings["shots"]
    numbers = _mean_curves(run.records())
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
                points = [
                    n
                    for n in numbers
                    if (n["method"], n["finetune"], n["shots"]) == (method, kind, few)
                ]
                epochs = [n["epoch"] + 1 for n in points]
                means = [n["accuracy"] for n in points]
                color = plotting.COLORS[method]
                marker = plotting.MARKERS[method] if len(epochs) <= 12 else None
                ax.plot(
                    epochs,
                    means,
                    color=color,
                    marker=marker,
                    markersize=6,
                    label=plotting.LABELS[method],
                )
                if points and not math.isnan(points[0]["standard_error"]):
                    low = [n["accuracy"] - n["standard_error"] for n in points]
                    high = [n["accuracy"] + n["standard_error"] for n in points]
                    ax.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=0)
            ax.set_title(
                f"{plotting.LABELS[kind]}, {'all' if few == 'all' else few} images", fontsize=14
            )
        line[0].set_ylabel("held-out accuracy (%)")
    for ax in axes[-1]:
        ax.set_xlabel("epoch of fine-tuning")
    plotting.legend_below(fig, axes[0][0])
    return plotting.save(fig, run, "curves", numbers)


def _mean_curves(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    values: dict[tuple[str, str, str, int], list[float]] = {}
    for r in records:
        if r.get("phase") == "finetune":
            key = r["method"], r["finetune"], r["shots"], r["epoch"]
            values.setdefault(key, []).append(100 * r["validation"])
    return [
        {
            "method": method,
            "finetune": finetune,
            "shots": shots,
            "epoch": epoch,
            "accuracy": statistics.fmean(found),
            "standard_error": standard_error(found),
        }
        for (method, finetune, shots, epoch), found in values.items()
    ]
