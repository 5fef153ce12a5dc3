"""Times steps of LoRA-ML where freed memory returns to the system, and where the process keeps it.

python -m benchmarks.freed_memory [--write DIR]

The C library of Linux, glibc, returns large freed blocks to the system, which clears their pages
anew for the next step. The environment variables KEEP change that. Each measurement is a process of
its own, on one thread, without and with the variables in turn; its processor time is measured.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import metalora
from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.encoders import new_model
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard, option, parse
from experiments.vision.mixer import Mixer, MixerConfig

KEEP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
MODELS = {
    "mixer": "MLP-Mixer, 4 tasks of 64 images, r 1",
    "minilm": "MiniLM's size, 4 tasks of 20 sequences of 48 tokens, r 8",
}
PRECISIONS = ("fp32", "bf16")
TASKS = 4


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of this benchmark."""

    processes: int = option(3, help="for each model and precision, with and without the variables")
    steps: int = option(5, help="timed in a process, after one that is not")
    only: str | None = option(
        None,
        choices=tuple(f"{model}-{precision}" for model in MODELS for precision in PRECISIONS),
        help="measure this in this process, as it was started, and print JSON",
    )


def new_step(model_name: str, precision: str, tiny: bool) -> Callable[[], None]:
    """A step of LoRA-ML as anyone would write it: the whole batch in one pass."""
    model: Any
    if model_name == "mixer":
        model, rank = Mixer(MixerConfig()), 1
        inputs = (torch.randn(TASKS if tiny else 256, 3, 32, 32),)
    else:
        model, rank = new_model("tiny" if tiny else "minilm-size"), 8
        inputs = (torch.randint(5, 64, (TASKS, 6) if tiny else (80, 48)),)
    count = len(inputs[0])
    task_ids = torch.arange(TASKS).repeat_interleave(count // TASKS)
    labels = torch.arange(count) % 2
    metalora.adapt(model, metalora.LoRAConfig(rank=rank), TASKS)
    optimizer = metalora.TaskOptimizer(model, torch.optim.Adam, lr=1e-4)
    model.train()

    def step() -> None:
        bf16 = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")
        with bf16, metalora.tasks(task_ids):
            found = model(*inputs)
            logits: Tensor = found if isinstance(found, Tensor) else found.logits
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
        metalora.task_mean(losses, task_ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured_here(name: str, steps: int, tiny: bool) -> dict[str, float]:
    """Median seconds and page faults of a step, and the most memory of the process, in bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model_name, precision = name.split("-")
    step = new_step(model_name, precision, tiny)
    step()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    times = []
    for _ in range(steps):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "seconds": statistics.median(times),
        "faults": (used.ru_minflt - faults) / steps,
        "peak": used.ru_maxrss * 1024,
    }


def measured_apart(name: str, steps: int, tiny: bool, kept: bool) -> dict[str, float]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.freed_memory"]
    command += ["--only", name, "--steps", str(steps), *(["--smoke"] if tiny else [])]
    environment = {key: value for key, value in os.environ.items() if key not in KEEP}
    environment |= KEEP if kept else {}
    run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: medians over the processes, and the range of the ratios of neighbours."""
    header = ["step", "precision", "seconds", "if kept", "times as fast", "page faults", "if kept"]
    header += ["peak memory, MiB", "if kept"]
    shown = []
    for row in rows:
        pairs = list(zip(row["returned"], row["kept"], strict=True))
        ratios = [without["seconds"] / with_["seconds"] for without, with_ in pairs]
        medians = {
            part: [statistics.median(pair[side][part] for pair in pairs) for side in (0, 1)]
            for part in ("seconds", "faults", "peak")
        }
        shown.append(
            [
                MODELS[row["model"]],
                row["precision"],
                *(f"{value:.3f}" for value in medians["seconds"]),
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
                *(f"{value:,.0f}" for value in medians["faults"]),
                *(f"{value / 2**20:,.0f}" for value in medians["peak"]),
            ]
        )
    return header, shown


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measures every model in both precisions, and prints the table."""
    settings = parse(Settings, argv, prog=program("freed_memory"), description=__doc__ or "")
    steps, processes, models = settings.steps, settings.processes, tuple(MODELS)
    if settings.smoke:
        steps, processes, models = 2, 1, models[:1]
    if settings.only is not None:
        print(json.dumps(measured_here(settings.only, steps, settings.smoke)))
        return
    rows = []
    for model in models:
        for precision in PRECISIONS:
            found: dict[str, list[dict[str, float]]] = {"returned": [], "kept": []}
            for _ in range(processes):
                for how, runs in found.items():
                    name = f"{model}-{precision}"
                    runs.append(measured_apart(name, steps, settings.smoke, how == "kept"))
            rows.append({"model": model, "precision": precision, **found})
    torch.set_num_threads(1)  # as in the processes that measured
    write_table(
        settings.name or "freed_memory_cpu",
        "Steps of LoRA-ML where freed memory is returned, and where it is kept",
        repeat("freed_memory", argv),
        *table(rows),
        rows,
        settings.write,
    )


if __name__ == "__main__":
    main()
