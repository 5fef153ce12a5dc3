"""``python -m experiments.demo``: Figure 1, and the vision protocol on handwritten digits."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.lib import cli
from experiments.lib.errors import RunError
from experiments.lib.experiment import RunSettings
from experiments.lib.machine import one_thread
from experiments.lib.manifest import MANIFEST
from experiments.lib.retraining_settings import FINETUNES, METHODS
from experiments.lib.runs import RunFolder, default_folder
from experiments.lib.statistics import summarize, with_error

NAMES = {"lora": "LoRA", "last-layer": "last layer"}
VISION_SEEDS = 3
VISION_SHOTS = ("10",)


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs both experiments and prints one table of each and where the figures are."""
    settings = cli.parse(
        RunSettings,
        argv,
        prog="python -m experiments.demo",
        description="All sweeps of the paper's Figure 1, then its vision protocol on digits.",
    )
    out = _folder(settings)
    start = time.monotonic()
    print("1/2  Figure 1 of the paper: five sweeps of the linear model", flush=True)
    linear, linear_table = run_linear(out, settings.smoke)
    print("2/2  vision protocol: handwritten digits, test task 8 or 9", flush=True)
    vision = run_vision(out, settings.smoke)
    print(f"\n{linear_table}\n\n{vision_table(vision.rows())}\n")
    for path in sorted([*linear.folder.glob("*.png"), *vision.folder.glob("*.png")]):
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

    It goes on with those that are in the demo's folder already, as `run_vision` does.

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


def run_vision(demo: Path, smoke: bool = False) -> RunFolder:
    """Runs all retrainings and both fine-tunings on digits, with few images of the test task."""
    from experiments.vision.run import VISION
    from experiments.vision.settings import VisionSettings

    out = demo / "vision"
    settings = VisionSettings(
        data="digits",
        seeds=VISION_SEEDS,
        shots=VISION_SHOTS,
        device="cpu",
        smoke=smoke,
        out=out,
        resume=(out / MANIFEST).is_file(),
    )
    with one_thread():
        return VISION.run(settings, go_on=f"--resume --out {demo}")


def vision_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Returns each method's accuracy with either fine-tuning, at the best epoch as in the paper."""
    found = summarize(rows, ("method", "finetune", "shots"), ("accuracy_best",), scale=100)
    cells = {
        (line["method"], line["finetune"], line["shots"]): with_error(
            line["accuracy_best"], line["accuracy_best_se"], ".1f"
        )
        for line in found
    }
    shots = dict.fromkeys(line["shots"] for line in found)
    columns = [(kind, few) for kind in FINETUNES for few in shots]
    lines = ["held-out accuracy in %, mean (standard error), by fine-tuning and number of images"]
    heads = [f"{NAMES[kind]}, {few}" for kind, few in columns]
    lines.append(f"{'':<14}" + "".join(f"{head:>18}" for head in heads))
    for method in METHODS:
        shown = [cells[(method, *column)] for column in columns]
        lines.append(f"{method:<14}" + "".join(f"{cell:>18}" for cell in shown))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
