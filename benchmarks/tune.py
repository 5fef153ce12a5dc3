"""Times other launches of the CUDA kernels than those of csrc/cuda/tuning_table.h, row by row.

python -m benchmarks.tune --device cuda --write DIR    # tables, and DIR/tuning_table.h
python -m benchmarks.tune --device cuda --install      # writes it to csrc; build again then
python -m benchmarks.tune --device cpu --smoke         # tries every line, through tests/shim

For each row all candidates run the row's problems side by side, as CUDA graphs on a GPU. Results
must agree with those of the row as it stands. A row is changed where the geometric mean of the
times, over its problems, falls by more than 2 %.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib.cli import BenchmarkSettings, program, repeat
from benchmarks.lib.measure import Budget, Steps, beside_default_stream, graphed, side_by_side
from benchmarks.lib.tables import machine, write_table
from benchmarks.lib.tuning import TABLE, Row, read_table
from benchmarks.lib.tuning import write_table as write_rows
from experiments.lib.cli import main_guard, option, parse
from experiments.lib.errors import RunError

NAME = "tune"
# Blocks and depths to try. Every one of them can be launched with what is compiled.
CANDIDATES = {
    "token_rows": ((132, 264, 528, 1056), (2, 3, 4)),
    "merge_lora": ((264, 528, 1024, 2048), (0,)),
    "merge_lora_backward": ((128, 256, 512), (1, 2, 4, 8)),
    "task_matvec": ((128, 256, 512, 1024), (0,)),
    "product_plan": ((132, 264), (92, 184, 368, 736)),
    "bias_sums": ((1,), (0, 1)),
}
GAIN = 0.98  # of the time, below which a row is changed
NEEDED = 20.0  # seconds that a row may take
DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
# Relative to the norm: sums of other blocks are rounded differently.
TOLERANCES = {2: 1e-2, 4: 1e-4, 8: 1e-11}
# Rows of each task, in and out features; tasks, out, in, rank; tasks, samples, features, rank.
LAYERS = (((6400,) * 10, 768, 768), ((2048,) * 4, 4096, 4096), ((131072,) * 4, 64, 256))
WEIGHTS = ((10, 768, 768, 8), (16, 4096, 4096, 16), (4, 256, 64, 1))
MATVECS = ((1000, 100, 10, 1), (10, 10000, 64, 3))
SMALL_LAYERS = (((70, 70), 24, 16),)
SMALL_WEIGHTS, SMALL_MATVECS = ((2, 40, 24, 3),), ((2, 70, 10, 1),)

Problem = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of the tuner."""

    install: bool = option(False, help="write what was found to csrc/cuda/tuning_table.h")
    budget_seconds: float = option(math.inf, help="rows that do not fit into it stay as they are")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device != "cuda" and not self.smoke:
            raise ValueError(
                "argument --device: a CPU can only try the code, with --smoke; measure with cuda"
            )
        if self.install and self.device != "cuda":
            raise ValueError("argument --install: only what a GPU has measured, with --device cuda")


class Library:
    """The native library, whose table of launches can be changed."""

    def __init__(self, path: Path, operators: Any, device: str) -> None:
        self.operators, self.device = operators, device
        library = ctypes.CDLL(str(path))
        self._tune, self._tuned = library.metalora_cuda_tune, library.metalora_cuda_tuned
        self._tune.argtypes = [ctypes.c_int64] * 3
        self._tuned.argtypes = [ctypes.c_int64, *[ctypes.POINTER(ctypes.c_int64)] * 2]
        self._tune.restype = self._tuned.restype = ctypes.c_bool

    def table(self) -> list[tuple[int, int]]:
        """The choice of every row as it is now."""
        found: list[tuple[int, int]] = []
        blocks, depth = ctypes.c_int64(), ctypes.c_int64()
        while self._tuned(len(found), ctypes.byref(blocks), ctypes.byref(depth)):
            found.append((blocks.value, depth.value))
        return found

    def change(self, row: int, choice: tuple[int, int]) -> None:
        if not self._tune(row, *choice):
            raise RunError(f"{program(NAME)}: the native library has no row {row}")


def cuda_library() -> Library:
    found = importlib.util.find_spec("metalora._C_cuda")
    if found is None or found.origin is None:
        raise RunError(f"{program(NAME)} needs the CUDA library; build it with METALORA_BUILD=cuda")
    return Library(Path(found.origin), torch.ops.metalora, "cuda")


def shim_library() -> Library:
    """The CUDA code compiled for the host, as the tests run it."""
    from tests.shim import build

    cache = build.SHIM.parents[1] / ".pytest_cache" / "d" / "metalora_shim"
    cache.mkdir(parents=True, exist_ok=True)
    path = build.operators(cache)
    torch.ops.load_library(str(path))
    return Library(path, torch.ops.metalora_shim, "cpu")


def problems(row: Row, library: Library, smoke: bool) -> Iterator[Problem]:
    """What the row's kernels are timed on, with few products of a weight's size beside them."""
    make = {"task_matvec": _matvecs, "token_rows": _token}
    make |= dict.fromkeys(("product_plan", "bias_sums"), _products)
    return make.get(row.what, _merges)(row, library, smoke)


def _random(library: Library, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=library.device)


def _layers(
    library: Library, dtype: torch.dtype, own: torch.dtype, rank: int, smoke: bool
) -> Iterator[tuple[Tensor, tuple[Any, ...]]]:
    """dY, and x, weight, lora_A, lora_B and task_ptr; of the parameters in the dtype ``own``."""
    for rows, in_features, out_features in SMALL_LAYERS if smoke else LAYERS:
        tasks, total = len(rows), sum(rows)
        shapes = (
            (out_features, in_features),
            (tasks, rank, in_features),
            (tasks, out_features, rank),
        )
        x, grad = (_random(library, dtype, total, n) for n in (in_features, out_features))
        parameters = (_random(library, own, *shape) for shape in shapes)
        yield grad, (x, *parameters, torch.tensor([0, *accumulate(rows)]))


def _token(row: Row, library: Library, smoke: bool) -> Iterator[Problem]:
    rank = 128 if math.isinf(row.rank) else int(row.rank)
    seed = torch.tensor(3, device=library.device)
    ops, dtype = library.operators, DTYPES[row.element]
    for grad, (x, weight, *rest) in _layers(library, dtype, dtype, rank, smoke):

        def step(grad: Tensor = grad, x: Tensor = x, w: Tensor = weight, rest: Any = rest) -> Any:
            settings = (1.0, 0.1, seed, True)
            y, *kept = ops.lora_linear_token(x, w, None, *rest, *settings)
            needs = (True, False, False, True, True)
            backward = ops.lora_linear_token_backward
            return y, *backward(grad, x, w, *rest, *kept, *settings, *needs, None)

        yield step


def _products(row: Row, library: Library, smoke: bool) -> Iterator[Problem]:
    own = DTYPES[max(row.element, 4)]
    backward = library.operators.lora_linear_weight_backward
    for grad, layer in _layers(library, DTYPES[row.element], own, 8, smoke):
        needs = (False, True, row.what == "bias_sums", True, True)
        given = (grad, *layer, 1.0, None, True, *needs)
        yield partial(backward, *given)


def _merges(row: Row, library: Library, smoke: bool) -> Iterator[Problem]:
    dtype, own = DTYPES[row.element], DTYPES[max(row.element, 4)]
    ops = library.operators
    for tasks, out, in_, rank in SMALL_WEIGHTS if smoke else WEIGHTS:
        lora_A = _random(library, own, tasks, rank, in_)
        lora_B = _random(library, own, tasks, out, rank)
        if row.what == "merge_lora":
            weight = _random(library, own, out, in_)
            yield partial(_alone, ops.merge_lora, weight, lora_A, lora_B, 0.7, dtype, True)
        else:
            grad = _random(library, dtype, tasks, out, in_)
            yield partial(ops.merge_lora_backward, grad, lora_A, lora_B, 0.7, True)


def _alone(operator: Any, *given: Any) -> tuple[Tensor]:
    return (operator(*given),)


def _matvecs(row: Row, library: Library, smoke: bool) -> Iterator[Problem]:
    ops, dtype = library.operators, DTYPES[row.element]
    for tasks, samples, d, rank in SMALL_MATVECS if smoke else MATVECS:
        weight, lora_U = _random(library, dtype, d, d), _random(library, dtype, tasks, d, rank)
        x, grad = (_random(library, dtype, tasks, samples, d) for _ in range(2))

        def step(given: Any = (weight, x, lora_U), grad: Tensor = grad) -> Any:
            backward = ops.task_matvec_backward(grad, *given, *[True] * 3)
            return ops.task_matvec(*given), *backward

        yield step


def candidates(row: Row) -> list[tuple[int, int]]:
    """The choices to try, that of the row first."""
    return list(dict.fromkeys([row.choice, *product(*CANDIDATES[row.what])]))


def tune_row(library: Library, index: int, row: Row, smoke: bool) -> dict[str, Any]:
    """Times every choice for a row; says which is the quickest, and by how much."""
    choices = candidates(row)[: 3 if smoke else None]
    ratios: dict[tuple[int, int], list[float]] = {choice: [] for choice in choices}
    wrong: set[tuple[int, int]] = set()
    for problem in problems(row, library, smoke):
        steps: dict[str, list[Steps]] = {}
        exact: list[Tensor] = []
        for choice in choices:
            library.change(index, choice)
            result = [t.clone() for t in problem()]
            exact = exact or result
            if all(map(_agree, result, exact, [TOLERANCES[row.element]] * len(result))):
                steps[str(choice)] = [_step(library, index, choice, problem)]
            else:
                wrong.add(choice)
        rounds, turn = (1, 1e-6) if smoke else (10, 0.005)
        times = side_by_side(steps, library.device, rounds=rounds, seconds_a_turn=turn)
        for choice in choices:
            if str(choice) in times:
                now = times[str(row.choice)]["total"].median
                ratios[choice].append(math.log(times[str(choice)]["total"].median / now))
    library.change(index, row.choice)
    relative = {
        choice: math.exp(sum(logs) / len(logs))
        for choice, logs in ratios.items()
        if choice not in wrong
    }
    best = min(relative, key=relative.__getitem__)
    best = best if relative[best] < GAIN else row.choice
    return {
        "row": row.name,
        "best": best,
        "relative": relative[best],
        "all": {str(choice): ratio for choice, ratio in relative.items()},
        "wrong": sorted(map(str, wrong)),
    }


def _agree(got: Tensor, exact: Tensor, tolerance: float) -> bool:
    if exact.numel() == 0:
        return got.numel() == 0
    off = (got.double() - exact.double()).norm() / exact.double().norm().clamp_min(1e-300)
    return bool(off <= tolerance)


def _step(library: Library, index: int, choice: tuple[int, int], problem: Problem) -> Steps:
    """One call with this choice; on a GPU a graph that was captured with it."""
    if library.device == "cuda":
        library.change(index, choice)
        return graphed({"call": problem})[0]

    def call() -> None:
        library.change(index, choice)
        problem()

    return {"call": call}


def tune(library: Library, smoke: bool, budget: Budget) -> tuple[list[Row], list[dict[str, Any]]]:
    """The table with what was found to be quickest, and the measurements."""
    rows = list(read_table())
    if library.table() != [row.choice for row in rows]:
        raise RunError(f"{program(NAME)}: the native library is not of this {TABLE.name}; build it")
    records = []
    for index in sorted(range(len(rows)), key=lambda i: rows[i].element):
        if not budget.allows(NEEDED):
            continue
        with beside_default_stream(library.device):
            record = tune_row(library, index, rows[index], smoke)
        blocks, depth = record["best"]
        records.append(record)
        print(f"{rows[index].name}: {blocks}, {depth}", flush=True)
        rows[index] = replace(rows[index], blocks=blocks, depth=depth)
    return rows, records


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Tunes the table."""
    settings = parse(Settings, argv, prog=program(NAME), description=__doc__ or "")
    library = cuda_library() if settings.device == "cuda" else shim_library()
    before = read_table()
    rows, records = tune(library, settings.smoke, Budget(settings.budget_seconds))
    here = machine(settings.device)
    place = f"{here['gpu']}, torch {here['torch']}, {here['date']}" if "gpu" in here else "no GPU"
    if settings.write is not None:
        settings.write.mkdir(parents=True, exist_ok=True)
        write_rows(settings.write / TABLE.name, rows, place)
    if settings.install:
        write_rows(TABLE, rows, place)
    found = {record["row"]: record for record in records}
    lines = [
        [
            old.name,
            f"{old.blocks}, {old.depth}",
            f"{new.blocks}, {new.depth}",
            f"{found[old.name]['relative']:.3f}" if old.name in found else "not measured",
            "; ".join(found.get(old.name, {}).get("wrong", [])),
        ]
        for old, new in zip(before, rows, strict=True)
    ]
    write_table(
        settings.name or f"{NAME}_{settings.device}",
        "Launches of the CUDA kernels",
        repeat(NAME, argv),
        ["what", "blocks, depth before", "quickest", "time relative to before", "wrong"],
        lines,
        records,
        settings.write,
        settings.device,
    )
    return 0


if __name__ == "__main__":
    main()
