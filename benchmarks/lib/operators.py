"""The command of every operator's benchmark: gates, measures side by side, and writes tables."""

from __future__ import annotations

import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.cases import (
    PRECISIONS,
    Benchmark,
    Candidate,
    Case,
    NotOfferedError,
    Options,
    Precision,
)
from benchmarks.lib.cli import BenchmarkSettings, program, repeat, with_lists
from benchmarks.lib.gate import GateError
from benchmarks.lib.measure import Budget, CpuClock, side_by_side
from benchmarks.lib.profile import HEADER, profile
from benchmarks.lib.tables import machine, read_json, write_json, write_table
from experiments.lib.cli import check_values, main_guard, option, parse
from experiments.lib.errors import RunError
from metalora._checks import first_line

LEFT_OUT = "left out: the time was up"
# Seconds that must be left to begin with a case or one more of its versions, by how it is made.
NEEDED = {"": 10.0, "compile": 30.0, "max-autotune": 90.0}


def measure_case(
    benchmark: Benchmark, case: Case, precision: Precision, options: Options, budget: Budget
) -> dict[str, Any]:
    """One record of the results: the case and a row for every version."""
    torch.compiler.reset()  # of other cases: a function is compiled anew only a few times
    prepared: dict[str, Candidate] = {}
    rows: dict[str, dict[str, Any]] = {}
    with precision.products():
        make = case.candidates(precision, options)
        for name in case.offered(options.names):
            if not budget.allows(NEEDED.get(name.partition("+")[2], 10.0)):
                rows[name] = {"status": LEFT_OUT}
                continue
            try:
                found = prepared[name] = make(name)
                rows[name] = {"status": "timed", "error": found.error, "note": found.note}
                rows[name] |= {"peak_bytes": found.peak_bytes, "padding": found.padding}
                rows[name] |= found.details
            except NotOfferedError as error:
                rows[name] = {"status": f"not offered: {error}"}
            except GateError as error:
                rows[name] = {"status": f"wrong: {error}"}
            except Exception as error:
                rows[name] = {"status": f"failed: {type(error).__name__}: {first_line(error)}"}
        del make  # and its exact results
        rounds = min(options.rounds, case.most_rounds)
        if case.once:
            rounds = max((len(found.sets) for found in prepared.values()), default=0)
        timings = side_by_side(
            {name: found.sets for name, found in prepared.items()},
            options.device,
            rounds=rounds,
            warm=not case.once,
            seconds_a_turn=options.seconds_a_turn,
            timer=options.timer,
            scales={name: found.scales for name, found in prepared.items()},
        )
    about = case.about(precision, options.device)
    floor = timings.get(benchmark.floor)
    for name, timing in timings.items():
        rows[name] |= {step: asdict(one) for step, one in timing.items()}
        if floor is not None:
            rows[name]["relative"] = timing["total"].median / floor["total"].median
    return {**_key(case, precision, options), "operator": case.operator, **about, "rows": rows}


def _key(case: Case, precision: Precision, options: Options) -> dict[str, Any]:
    return {"case": case.name, "precision": precision.name, "frozen": options.frozen}


def measure(
    benchmark: Benchmark,
    cases: Sequence[Case],
    precisions: Sequence[Precision],
    options: Options,
    settings: BenchmarkSettings,
    *,
    command: str,
    budget: Budget | None = None,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Measures all cases, and writes a .json file after each and the .md of tables at the end.

    With ``resume`` the file's other cases stay in it, a case that is measured again has its earlier
    versions too, and the command that is written names all of them.
    """
    here, budget = machine(options.device), budget or Budget()
    title = f"{benchmark.title} on {'the CPU' if options.device == 'cpu' else 'a GPU'}"
    title += ", shared weights frozen" * options.frozen + ", tiny sizes" * settings.smoke
    record: dict[str, Any] = {"title": title, "command": command, "floor": benchmark.floor}
    record |= {"machine": here, "rows": []}
    folder, name = settings.write, settings.name or f"{benchmark.name}_{options.device}"
    path = None if folder is None else folder / f"{name}.json"
    known: dict[Any, Any] = {}
    if resume and path is not None and path.exists():
        known = {(r["case"], r["precision"], r["frozen"]): r for r in _earlier(path, here)}
    records = {key: found for key, found in known.items() if key[-1] == options.frozen}
    for precision in precisions:
        for case in cases:
            key = _key(case, precision, options)
            found = known.get(tuple(key.values()))
            earlier = () if found is None else found["rows"]
            names = case.offered(tuple(dict.fromkeys([*options.names, *earlier])))
            if found is not None and not _complete(found, names):
                found = None
            if found is None and budget.allows(NEEDED[""]):
                print(f"{case.name}, {precision.name}", file=sys.stderr, flush=True)
                asked = replace(options, names=tuple(names))
                found = measure_case(benchmark, case, precision, asked, budget)
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
            elif found is None:
                found = {**key, "rows": {n: {"status": LEFT_OUT} for n in names}}
            records[tuple(key.values())] = found
            record["rows"] = _in_order(benchmark, records.values())
            if known:
                record["command"] = with_lists(command, _lists(benchmark, record["rows"]))
            if path is not None:
                write_json(path, record)
    text = benchmark.page(record)
    print(text)
    if folder is not None:
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return record["rows"]


def _in_order(benchmark: Benchmark, records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """By precision and, within each, in the order of the benchmark's cases; others come last."""
    places = {case.name: i for i, case in enumerate(benchmark.cases)}
    order = list(PRECISIONS)
    return sorted(
        records, key=lambda r: (order.index(r["precision"]), places.get(r["case"], len(places)))
    )


def _lists(benchmark: Benchmark, records: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """The options that select all that is in some records."""
    lists = {"cases": [r["case"] for r in records]}
    if not benchmark.own_precisions:
        lists["precisions"] = [r["precision"] for r in records]
    lists["baselines"] = [name for r in records for name in r["rows"]]
    return {option: list(dict.fromkeys(values)) for option, values in lists.items()}


def _earlier(path: Path, here: dict[str, str]) -> list[dict[str, Any]]:
    """The records of an earlier run on this machine."""
    earlier = read_json(path)
    try:
        there = earlier["machine"] | {"date": here["date"]}
        rows: list[dict[str, Any]] = earlier["rows"]
    except (KeyError, TypeError):
        raise RunError(f"--resume: {path} holds no results; remove it first") from None
    if there != here:
        raise RunError(f"--resume: {path} was measured on another machine; remove it first")
    return rows


def _complete(record: dict[str, Any], names: Sequence[str]) -> bool:
    """Whether a record has a result for every name."""
    missing = {"status": LEFT_OUT}
    return all(record["rows"].get(name, missing) != missing for name in names)


@dataclass(frozen=True)
class Settings(BenchmarkSettings):
    """Settings of an operator's benchmark."""

    cases: tuple[str, ...] | None = option(
        None, help="groups of cases, goal for those with a goal, or a case's full name"
    )
    precisions: tuple[str, ...] | None = option(None, choices=tuple(PRECISIONS), help="dtypes")
    baselines: tuple[str, ...] | None = option(None, help="versions, or groups of versions")
    threads: int | None = option(
        None, help="torch's threads (default: torch's choice); with 1, processor time is measured"
    )
    frozen: bool = option(False, help="no gradients of the shared weights")
    budget_seconds: float | None = option(
        None, help="begin nothing that would take longer (default: no limit)"
    )
    profile: bool = option(False, help="show the kernels of each version instead of times")
    resume: bool = option(False, help="keep what the files of --write already hold")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values("benchmarks", self, most={"threads": os.cpu_count() or 1})
        if self.resume and self.write is None:
            raise ValueError("argument --resume: needs --write, the folder to go on with")

    def selected(self, benchmark: Benchmark) -> tuple[list[Case], tuple[str, ...]]:
        """The cases and the versions to measure.

        Raises:
            ValueError: for a word that names nothing.
        """
        if self.frozen and not benchmark.can_freeze:
            raise ValueError(f"argument --frozen: {benchmark.name} has no case with frozen weights")
        if self.precisions and benchmark.own_precisions:
            raise ValueError(
                f"argument --precisions: the versions of {benchmark.name} have precisions of their "
                "own; choose some with --baselines"
            )
        return (
            benchmark.select(self.cases or [benchmark.groups[self.device]]),
            benchmark.select_versions(self.baselines or [next(iter(benchmark.versions))]),
        )


def command(benchmark: Benchmark, description: str) -> Callable[..., None]:
    """The function that ``python -m benchmarks.<name>`` calls."""

    @main_guard
    def main(argv: Sequence[str] | None = None) -> None:
        settings = parse(Settings, argv, prog=program(benchmark.name), description=description)
        cases, names = settings.selected(benchmark)
        device = settings.device
        options = Options(names, device, settings.frozen)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        if device == "cuda":
            options = replace(options, seconds_a_turn=0.005)
        elif settings.threads == 1:  # waiting for a core that others use does not count
            options = replace(options, timer=CpuClock(time.process_time))
        if settings.smoke:
            cases = [case.shrunk() for case in dict.fromkeys((cases[0], cases[-1]))]
            options = replace(options, rounds=1, seconds_a_turn=0.0)
        precisions = [PRECISIONS[name] for name in settings.precisions or benchmark.precisions]
        if settings.profile:
            rows, data = profile(cases, precisions, options)
            name = settings.name or f"profile_{benchmark.name}_{device}"
            again, folder = repeat(benchmark.name, argv), settings.write
            write_table(name, "Kernels of one call", again, HEADER, rows, data, folder, device)
            return
        measure(
            benchmark,
            cases,
            precisions,
            options,
            settings,
            command=repeat(benchmark.name, argv),
            budget=Budget(settings.budget_seconds or math.inf),
            resume=settings.resume,
        )

    return main
