"""Table and figures of a language run, from what its folder holds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.language.settings import FINETUNES
from experiments.runs import RunFolder, standard_error, with_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BEFORE, LAST, BEST = "accuracy_before", "accuracy_last", "accuracy_best"
METRICS = (BEFORE, LAST, BEST)
KEY = ("method", "finetune", "rank")


def row(
    model: str,
    method: str,
    finetune: str,
    rank: Any,
    task: str,
    trial: int,
    metric: str,
    value: Any,
) -> dict[str, Any]:
    """One measured value as results.csv has it.

    Rows about retraining leave the fine-tuning out; those of no single task, the task; those
    without LoRA, the rank.
    """
    return {
        "experiment": "language",
        "model": model,
        "method": method,
        "finetune": finetune,
        "rank": "" if rank is None else rank,
        "task": task,
        "trial": trial,
        "metric": metric,
        "value": value,
    }


def summary(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Per method, fine-tuning and rank the accuracies in percent, in results' order.

    Of each trial the mean over test tasks is taken; of these the mean and the standard error,
    which for one trial is NaN.
    """
    per_task = [r for r in rows if r["metric"] in METRICS]
    lines = []
    for key, of_key in _grouped(per_task, KEY).items():
        trials = _grouped(of_key, ("trial",))
        line: dict[str, Any] = {**dict(zip(KEY, key, strict=True)), "trials": len(trials)}
        for metric in METRICS:
            means = [_mean(r for r in of if r["metric"] == metric) for of in trials.values()]
            line[metric] = statistics.fmean(means)
            line[f"{metric}_se"] = standard_error(means)
        lines.append(line)
    return lines


def by_task(rows: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """Per test task, method, fine-tuning and rank the last epoch's accuracy in percent."""
    of_metric = [r for r in rows if r["metric"] == LAST]
    lines = []
    for key, of_key in _grouped(of_metric, (*KEY, "task")).items():
        values = [100 * float(r["value"]) for r in of_key]
        line: dict[str, Any] = dict(zip((*KEY, "task"), key, strict=True))
        line |= {LAST: statistics.fmean(values), f"{LAST}_se": standard_error(values)}
        lines.append(line)
    return lines


def _grouped(
    rows: Iterable[Mapping[str, str]], names: Sequence[str]
) -> dict[tuple[str, ...], list[Mapping[str, str]]]:
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for r in rows:
        groups.setdefault(tuple(r[name] for name in names), []).append(r)
    return groups


def _mean(rows: Iterable[Mapping[str, str]]) -> float:
    return statistics.fmean(100 * float(r["value"]) for r in rows)


def table(lines: Iterable[Mapping[str, Any]], chance: float) -> str:
    """The summary as text: accuracy in percent, with its standard error in brackets.

    Args:
        lines: of `summary`.
        chance: accuracy of a blind choice, in percent.
    """
    text = [
        f"{'retraining':<14} {'fine-tuning':<11} {'rank':>4} {'trials':>6} "
        f"{'last epoch':>14} {'best epochs':>14} {'not fine-tuned':>15}"
    ]
    for line in lines:
        last, best, before = (with_error(line[m], line[f"{m}_se"]) for m in (LAST, BEST, BEFORE))
        text.append(
            f"{line['method']:<14} {line['finetune']:<11} {line['rank'] or '-':>4} "
            f"{line['trials']:>6} {last:>14} {best:>14} {before:>15}"
        )
    text.append(f"{'(chance)':<38} {chance:>7.2f}")
    text.append(
        "held-out accuracy in %, mean over test tasks; mean (standard error) over trials; best: "
        "each task at its own best epoch, which is optimistic"
    )
    return "\n".join(text)


def table_of_ranks(lines: Iterable[Mapping[str, Any]]) -> str:
    """The last epoch's accuracy after fine-tuning with LoRA: a line per method, a column per rank.

    "" where there is but one rank.
    """
    cells = {
        (line["method"], line["rank"]): with_error(line[LAST], line[f"{LAST}_se"])
        for line in lines
        if line["finetune"] == "lora"
    }
    ranks = list(dict.fromkeys(rank for _, rank in cells))
    if len(ranks) < 2:
        return ""
    text = [f"{'LoRA of rank':<14}" + "".join(f"{rank:>15}" for rank in ranks)]
    for method in dict.fromkeys(method for method, _ in cells):
        text.append(f"{method:<14}" + "".join(f"{cells[method, rank]:>15}" for rank in ranks))
    return "\n".join(text)


def figures(run: RunFolder, chance: float) -> list[Path]:
    """Draws accuracy.png (the table) and tasks.png (each test task), with numbers."""
    from experiments import plotting

    lines = summary(run.rows())
    if not lines:
        return []
    plotting.style()
    return [_accuracy(run, lines, chance), _tasks(run, by_task(run.rows()), chance)]


def _accuracy(run: RunFolder, lines: Sequence[Mapping[str, Any]], chance: float) -> Path:
    import matplotlib.pyplot as plt

    from experiments import plotting

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
        f"{_model_name(run)}, fine-tuned on unseen personas: last epoch, mean and standard error "
        f"of {trials} trial{'s' if trials > 1 else ''}",
        fontsize=13,
    )
    return plotting.save(fig, run, "accuracy", lines)


def _model_name(run: RunFolder) -> str:
    return Path(run.manifest["settings"]["model"]).name


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
    from experiments import plotting

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
    from experiments import plotting

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

    from experiments import plotting

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
