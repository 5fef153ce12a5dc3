"""``python -m experiments.demo``: Figure 1, and tasks in conflict on handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.lib import cli
from experiments.lib.errors import RunError
from experiments.lib.experiment import RunSettings
from experiments.lib.machine import one_thread
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFolder, default_folder
from experiments.lib.statistics import with_error

# Shorter than by default: the demo ends within two minutes.
SEEDS, EPOCHS, FINETUNE_EPOCHS = 3, 10, 15
LORA_RATES, LAST_LAYER_RATES = (1e-2, 3e-2, 1e-1), (3e-2, 1e-1, 3e-1)  # to choose from
METHODS = ("lora-ml", "last-layer-ml", "standard")


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs both experiments and prints one table of each and where the figures are."""
    settings = cli.parse(
        RunSettings,
        argv,
        prog="python -m experiments.demo",
        description="All sweeps of the paper's Figure 1, then tasks in conflict on digits.",
    )
    out = _folder(settings)
    start = time.monotonic()
    print("1/2  Figure 1 of the paper: five sweeps of the linear model", flush=True)
    linear, linear_table = run_linear(out, settings.smoke)
    print("2/2  handwritten digits: 28 tasks in conflict, eight unseen ones", flush=True)
    conflict = run_conflict(out, settings.smoke)
    print(f"\n{linear_table}\n\n{conflict_table(conflict.rows())}\n")
    for path in sorted([*linear.folder.glob("*.png"), *conflict.folder.glob("*.png")]):
        print(f"figure: {path}")
    print(f"done in {time.monotonic() - start:.0f} s; all numbers are in {out}")


def _folder(settings: RunSettings) -> Path:
    """Returns the demo's folder, which holds the two runs', after checking that it can be used."""
    if settings.resume:
        if settings.out is None:
            raise RunError("--resume needs --out, the folder of the demo to go on with")
        if not (settings.out / "linear" / MANIFEST).is_file():
            raise RunError(f"--resume: {settings.out} holds no demo (linear/{MANIFEST} is missing)")
        return settings.out
    out = default_folder("demo") if settings.out is None else settings.out
    if out.exists() and (out.is_file() or any(out.iterdir())):
        hint = " or add --resume to go on with it" if (out / "linear" / MANIFEST).is_file() else ""
        raise RunError(f"output folder {out} exists and is not empty; choose another --out{hint}")
    return out


def run_linear(demo: Path, smoke: bool = False) -> tuple[RunFolder, str]:
    """Runs all five sweeps of Figure 1 with 5 trials (paper, section 3 and appendix D.1).

    It goes on with those that are in the demo's folder already, as `run_conflict` does.

    Returns:
        The run's folder and its table.
    """
    from experiments.synthetic.linear.run import LINEAR
    from experiments.synthetic.linear.settings import LinearSettings
    from experiments.synthetic.linear.summary import table

    out = demo / "linear"
    resume = (out / MANIFEST).is_file()
    settings = LinearSettings(vary="all", trials=5, smoke=smoke, out=out, resume=resume)
    folder = LINEAR.run(settings, go_on=f"--resume --out {demo}")
    return folder, table(settings.points(), folder.rows())


def run_conflict(demo: Path, smoke: bool = False) -> RunFolder:
    """Retrains on pairs of digits that contradict each other, then adapts to pairs with a new one.

    Half of the tasks have their labels flipped.
    """
    from experiments.conflict.run import CONFLICT
    from experiments.conflict.settings import ConflictSettings

    out = demo / "conflict"
    settings = ConflictSettings(
        data="digits",
        retrain=METHODS,
        pairs=("all",),
        inputs=("none",),
        flipped=(0.5,),
        lora_rates=LORA_RATES,
        last_layer_rates=LAST_LAYER_RATES,
        seeds=SEEDS,
        device="cpu",
        smoke=smoke,
        out=out,
        resume=(out / MANIFEST).is_file(),
    )
    if not smoke:
        settings = replace(settings, epochs=EPOCHS, finetune_epochs=FINETUNE_EPOCHS)
    with one_thread():
        return CONFLICT.run(settings, go_on=f"--resume --out {demo}")


def conflict_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns accuracies on the retraining tasks and, by number of images, on the unseen ones."""
    from experiments.conflict.summary import RETRAINING, best_finetuning, summary

    retrained = [{**line, "shots": ""} for line in summary(rows, RETRAINING)]
    cells = {
        (line["method"], line["shots"]): with_error(line["value"], line["value_se"], ".1f")
        for line in [*retrained, *best_finetuning(rows)]
    }
    shots = dict.fromkeys(few for _, few in cells)
    heads = [f"unseen, {few} images" if few else "retraining tasks" for few in shots]
    lines = [
        "held-out accuracy on pairs of digits in %, mean (standard error): the retraining tasks,",
        "and unseen tasks after fine-tuning on a few images of each",
        f"{'':<14}" + "".join(f"{head:>19}" for head in heads),
    ]
    for method in dict.fromkeys(method for method, _ in cells):
        shown = [cells[method, few] for few in shots]
        lines.append(f"{method:<14}" + "".join(f"{cell:>19}" for cell in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
