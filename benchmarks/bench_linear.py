"""Times the linear model's training beside its alternatives, in about a minute.

python -m benchmarks.bench_linear [--write benchmarks/results]

One training is the paper's: d = 10, T = 3, k = 1, N = 5000, 3000 outer steps of 10 inner ones each.
The versions that go through the samples at every step run a few steps only; their time is scaled
up. Every version's iterates are compared with the native ones before anything is timed.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cli import TableSettings, parse
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard
from experiments.lib.runs import RunFolder
from experiments.synthetic import linear, trials
from experiments.synthetic.settings import LinearSettings, Point
from metalora._library import native_available
from metalora.linear import (
    finetune_lora,
    lora_ml,
    sample_data,
    sample_problem,
    standard,
    sufficient_statistics,
)
from metalora.reference import linear as reference

TASKS, DIM, RANK, SAMPLES, OUTER, INNER = 3, 10, 1, 5000, 3000, 10
OUTER_LR, INNER_LR, FINETUNE_LR = 0.03, 0.003, 0.005
SHORT = 5  # steps of the versions that go through the samples
MANY = 64  # trainings at once


HEADER = ["", "version", "threads", "median", "fastest", "slowest", "runs", "relative", "note"]
LIBRARIES: dict[str, Callable[[Tensor], Any]] = {"numpy": Tensor.numpy, "PyTorch": Tensor.detach}


@dataclass(frozen=True)
class Row:
    """One line of the table: seconds, with the fastest and the slowest run."""

    group: str
    name: str
    threads: int
    median: float
    fastest: float
    slowest: float
    runs: int
    note: str = ""


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Prints the table."""
    settings = parse(TableSettings, argv, "bench_linear", __doc__)
    if not native_available():
        print("the native library is not built: 'native' below is the reference")
    threads = torch.get_num_threads()
    with _threads(1):
        rows = [*_one_training(), *_other_trainers()]
    rows += [_many_trainings(threads), *_figure_1(threads)]
    report(rows, settings.write)


def _one_training() -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    problem = sample_problem(TASKS, DIM, RANK, generator=generator)
    x, y = sample_data(problem.truths, SAMPLES, generator=generator)
    start = 0.1 * torch.randn(TASKS, DIM, RANK, generator=generator, dtype=torch.float64)
    stats = sufficient_statistics(x, y)
    single, single_start = stats.to(dtype=torch.float32), start.float()

    def native(outer_steps: int = OUTER) -> Tensor:
        return lora_ml(stats, RANK, outer_steps=outer_steps, initial_factors=start).weight

    def native_single() -> Tensor:
        return lora_ml(single, RANK, initial_factors=single_start).weight

    zero = torch.zeros(DIM, DIM, dtype=torch.float64)

    def plain(outer_steps: int = OUTER) -> Tensor:
        return reference.lora_ml(
            *(stats.gram, stats.cross, stats.energy, zero, start, SAMPLES),
            *(outer_steps, INNER, OUTER_LR, INNER_LR),
        )[0]

    def looping(library: str) -> Any:
        kind = LIBRARIES[library]
        return loop_lora_ml(kind(x), kind(y), kind(zero), kind(start), SHORT)

    for other in (plain(SHORT), *(torch.as_tensor(looping(library)) for library in LIBRARIES)):
        torch.testing.assert_close(other, native(SHORT), rtol=0, atol=1e-10)
    scale = OUTER / SHORT
    note = f"{SHORT} outer steps timed, scaled to {OUTER}"
    group = "one LoRA-ML training"
    return [
        _time(group, "native, float64", native, 21),
        _time(group, "native, float32", native_single, 21),
        _time(group, "reference (plain PyTorch)", plain, 1),
        *(
            _time(group, f"through the samples, {name}", partial(looping, name), 3, scale, note)
            for name in LIBRARIES
        ),
        _time(
            "sufficient statistics", "of 3 x 5000 samples", lambda: sufficient_statistics(x, y), 21
        ),
        _time("one standard retraining", "native, float64", lambda: standard(stats), 21),
    ]


def _other_trainers() -> list[Row]:
    generator = torch.Generator().manual_seed(1)
    truth = sample_problem(1, DIM, RANK, generator=generator).test_truth
    stats = sufficient_statistics(*sample_data(truth, 100, generator=generator))
    weight = truth - 0.3

    def tune() -> object:
        return finetune_lora(stats, weight, 1, steps=10000, truth=truth, generator=generator)

    return [_time("one fine-tuning", "native, 10000 steps with curve", tune, 21)]


def _many_trainings(threads: int) -> Row:
    generator = torch.Generator().manual_seed(2)
    problem = sample_problem(TASKS, DIM, RANK, batch_shape=(MANY,), generator=generator)
    stats = sufficient_statistics(*sample_data(problem.truths, 500, generator=generator))
    row = _time(
        f"{MANY} LoRA-ML trainings at once",
        "native, float64",
        lambda: lora_ml(stats, RANK, generator=generator),
        5,
        threads=threads,
    )
    return Row(**{**row.__dict__, "note": f"{MANY / row.median:.0f} trainings a second"})


def _figure_1(threads: int) -> list[Row]:
    """All five sweeps with 5 trials, from drawing the data to the written run folder."""
    settings = LinearSettings()
    group = "Figure 1"

    def compute() -> None:
        for point in settings.points():
            trials.run_point(point, settings)

    def everything() -> None:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            out = Path(folder) / "run"
            with RunFolder.create(out, settings, experiment=linear.EXPERIMENT) as run:
                linear.run(settings, run)

    problems = [LoopProblem(point, settings) for point in settings.points()]
    for problem in problems:
        problem.check()
    note = (
        f"trainings and curves; {SHORT} steps timed at the sizes of each of the "
        f"{len(problems)} settings, scaled to all steps and {settings.trials} trials"
    )
    rows = [
        _time(group, "native: data, trainings and curves", compute, 3, threads=threads),
        _time(group, "native, with run folder and six figures", everything, 1, threads=threads),
    ]
    with _threads(1):
        for library in LIBRARIES:
            totals = [sum(problem.seconds(library) for problem in problems) for _ in range(3)]
            rows.append(_row(group, f"through the samples, {library}", totals, 1, note))
    return rows


class LoopProblem:
    """A setting of Figure 1, for the versions that go through the samples at every step."""

    def __init__(self, point: Point, settings: LinearSettings) -> None:
        self.point, self.settings = point, settings
        generator = torch.Generator().manual_seed(3)
        problem = sample_problem(point.num_tasks, point.dim, point.rank, generator=generator)
        x, y = sample_data(problem.truths, point.retrain_samples, generator=generator)
        few = sample_data(problem.test_truth, point.finetune_samples, generator=generator)
        zero = torch.zeros(point.dim, point.dim, dtype=torch.float64)

        def start(*shape: int) -> Tensor:
            return 0.1 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        factors = start(point.num_tasks, point.dim, point.rank)
        u, v = (start(point.dim, point.finetune_rank) for _ in range(2))
        # By algorithm: its function, what it takes, how many steps and runs of it a trial has.
        self.loops: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], int, int]] = {
            "LoRA-ML": (loop_lora_ml, (x, y, zero, factors), settings.outer_steps, 1),
            "standard": (loop_standard, (x, y, zero), settings.outer_steps, 1),
            "fine-tuning": (
                *(loop_finetune, (*few, zero, u, v, problem.test_truth)),
                *(point.finetune_steps, 2),  # after either retraining
            ),
        }

    def run(self, algorithm: str, library: str) -> Any:
        """The result of ``SHORT`` steps."""
        function, tensors, _, _ = self.loops[algorithm]
        return function(*map(LIBRARIES[library], tensors), steps=SHORT)

    def check(self) -> None:
        """Raises AssertionError where a version differs from the native one."""
        x, y, zero, factors = self.loops["LoRA-ML"][1]
        stats = sufficient_statistics(x, y)
        few_x, few_y, _, u, v, truth = self.loops["fine-tuning"][1]
        tuned = finetune_lora(
            sufficient_statistics(few_x, few_y),
            *(zero, self.point.finetune_rank),
            steps=SHORT,
            initial_factors=(u, v),
            truth=truth,
        )
        assert tuned.errors is not None
        wanted = {
            "LoRA-ML": lora_ml(
                stats, self.point.rank, outer_steps=SHORT, initial_factors=factors
            ).weight,
            "standard": standard(stats, steps=SHORT).weight,
            "fine-tuning": tuned.errors[-1],
        }
        for algorithm, expected in wanted.items():
            for library in LIBRARIES:
                got = torch.as_tensor(self.run(algorithm, library))
                torch.testing.assert_close(
                    *(got, expected),
                    rtol=1e-10,
                    atol=1e-10,
                    msg=partial("{}, {}, {}: {}".format, library, algorithm, self.point.name),
                )

    def seconds(self, library: str) -> float:
        """Seconds for all steps and trials, from ``SHORT`` steps of every algorithm."""
        total = 0.0
        for algorithm, (_, _, steps, runs) in self.loops.items():
            begin = time.perf_counter()
            self.run(algorithm, library)
            total += (time.perf_counter() - begin) * runs * steps / SHORT
        return total * self.settings.trials


def _time(
    group: str,
    name: str,
    call: Callable[[], object],
    runs: int,
    scale: float = 1.0,
    note: str = "",
    threads: int = 1,
) -> Row:
    call()
    seconds = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        seconds.append(scale * (time.perf_counter() - begin))
    return _row(group, name, seconds, threads, note)


def _row(group: str, name: str, seconds: list[float], threads: int, note: str) -> Row:
    middle = statistics.median(seconds)
    return Row(group, name, threads, middle, min(seconds), max(seconds), len(seconds), note)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(rows: list[Row], folder: Path | None) -> None:
    """Prints the table and, given a folder, writes it there; each row beside its group's first."""
    first: dict[str, float] = {}
    cells = []
    for row in rows:
        ours = first.setdefault(row.group, row.median)
        times = [_seconds(seconds) for seconds in (row.median, row.fastest, row.slowest)]
        ratio = f"{row.median / ours:,.1f}x"
        cells.append(
            [row.group, row.name, str(row.threads), *times, str(row.runs), ratio, row.note]
        )
    write_table(
        "linear",
        "The linear model's training: seconds, and relative to the first line of each group",
        "python -m benchmarks.bench_linear --write benchmarks/results",
        HEADER,
        cells,
        [asdict(row) for row in rows],
        folder,
    )


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"


def loop_lora_ml(x: Any, y: Any, weight: Any, factors: Any, steps: int) -> Any:
    """LoRA-ML through the samples x, y [T, N, d] at every step; torch tensors or numpy arrays."""
    tasks, count, _ = x.shape
    u = list(factors)
    for _ in range(steps):
        total = 0 * weight
        for t in range(tasks):
            for _ in range(INNER):
                r = _gradient(x[t], y[t], weight + u[t] @ u[t].T)
                u[t] = u[t] - INNER_LR / count * (r + r.T) @ u[t]
            total = total + _gradient(x[t], y[t], weight + u[t] @ u[t].T)
        weight = weight - OUTER_LR / (count * tasks) * total
    return weight


def loop_standard(x: Any, y: Any, weight: Any, steps: int) -> Any:
    """Standard retraining in the same way."""
    tasks, count, _ = x.shape
    for _ in range(steps):
        total = sum(_gradient(x[t], y[t], weight) for t in range(tasks))
        weight = weight - OUTER_LR / (count * tasks) * total
    return weight


def loop_finetune(x: Any, y: Any, weight: Any, u: Any, v: Any, truth: Any, steps: int) -> Any:
    """Fine-tuning on x, y [n, d] in the same way, with its curve; the last prediction error."""
    errors = []
    for _ in range(steps):
        r = _gradient(x, y, weight + u @ v.T)
        u, v = u - FINETUNE_LR / len(x) * r @ v, v - FINETUNE_LR / len(x) * r.T @ u
        errors.append(((x @ (weight + u @ v.T - truth).T) ** 2).sum())
    return errors[-1]


def _gradient(x: Any, y: Any, weight: Any) -> Any:
    """N times the gradient of a task's loss in its weight: (W x - y) x, summed over samples."""
    return (x @ weight.T - y).T @ x


if __name__ == "__main__":
    main()
