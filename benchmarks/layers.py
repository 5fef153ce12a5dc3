"""Forward and backward of the multi-task LoRA layer, of metalora and of what one would write.

python -m benchmarks.layers                                      # the CPU's cases
python -m benchmarks.layers --device cuda --cases goal --precisions autocast tf32

Times are relative to a plain dense layer with the same shapes, dtype and gradients.
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.lib import cli
from benchmarks.lib.baselines import BASELINES, COMPILED, EAGER, ROUTES, NotOfferedError, Setup
from benchmarks.lib.gate import SEED, GateError, Run, check, exact_results, wanted_gradients
from benchmarks.lib.measure import (
    Budget,
    Steps,
    beside_default_stream,
    copies_past_the_cache,
    graphed,
    peak_bytes,
    side_by_side,
)
from benchmarks.lib.registry import PRECISIONS, Case, Precision, select
from benchmarks.lib.tables import layer_tables, machine, read_json, write_json
from experiments.lib.cli import main_guard, option
from experiments.lib.errors import RunError
from metalora import ops
from metalora._checks import check_positive, first_line

FLOOR = "dense"
LEFT_OUT = "left out: the time was up"
# Seconds that must be left to begin with a case or one more of its candidates, by how it is made.
NEEDED = {"": 10.0, "compile": 30.0, "max-autotune": 90.0}


@dataclass(frozen=True)
class Options:
    """How to measure, whatever the case."""

    names: tuple[str, ...]
    device: str = "cpu"
    frozen: bool = False
    rounds: int = 25
    seconds_a_turn: float = 0.02


def measure_case(
    case: Case, precision: Precision, options: Options, budget: Budget
) -> dict[str, Any]:
    """One record of the results: the case and a row for every candidate."""
    device = options.device
    torch.compiler.reset()  # of other cases: a function is compiled anew only a few times
    prepared: dict[str, list[Steps]] = {}
    rows: dict[str, dict[str, Any]] = {}
    with precision.products():
        first = case.tensors(precision, device)
        copies = copies_past_the_cache(sum(t.nbytes for t in first), device)
        sets = [first] + [case.tensors(precision, device, seed) for seed in range(1, copies)]
        exact: dict[bool, dict[str, Tensor]] = {}
        for adapters in (False, True):
            wanted = wanted_gradients(adapters, options.frozen)
            exact[adapters] = exact_results(case, first, wanted, adapters)
        for name in options.names:
            if not budget.allows(NEEDED[name.partition("+")[2]]):
                rows[name] = {"status": LEFT_OUT}
                continue
            try:
                prepared[name], rows[name] = _prepare(case, precision, name, options, sets, exact)
            except NotOfferedError as error:
                rows[name] = {"status": f"not offered: {error}"}
            except GateError as error:
                rows[name] = {"status": f"wrong: {error}"}
            except Exception as error:
                rows[name] = {"status": f"failed: {type(error).__name__}: {first_line(error)}"}
        del exact
        timings = side_by_side(
            prepared, device, rounds=options.rounds, seconds_a_turn=options.seconds_a_turn
        )
    route = _route(case, precision, first, device)
    for name, row in rows.items():
        if name in timings:
            row |= {step: asdict(timing) for step, timing in timings[name].items()}
        if name in timings and FLOOR in timings:
            row["relative"] = timings[name]["total"].median / timings[FLOOR]["total"].median
    return {**_key(case, precision, options), "route": route, "rows": rows}


def _prepare(
    case: Case,
    precision: Precision,
    name: str,
    options: Options,
    sets: Sequence[Sequence[Tensor]],
    exact: dict[bool, dict[str, Tensor]],
) -> tuple[list[Steps], dict[str, Any]]:
    """The steps of a candidate that passed the gate, for every set of tensors, and its row."""
    device, adapters = options.device, not name.startswith(FLOOR)
    wanted = wanted_gradients(adapters, options.frozen)
    checked = BASELINES[name](Setup(case, precision, device, SEED))
    run = Run(checked, sets[0], wanted, precision)
    _call(run, device)
    error = check(case, run.results, exact[adapters], precision.tolerance)
    # Without dropout what was checked is what is timed.
    layer = BASELINES[name](Setup(case, precision, device)) if case.dropout else checked
    del run
    runs = [Run(layer, tensors, wanted, precision) for tensors in sets]
    peak = _peak_memory(runs[0], device)
    row: dict[str, Any] = {"status": "timed", "error": error, "peak_bytes": peak, "note": ""}
    steps: list[Steps] = []
    for run in runs:
        one: Steps = {"forward": run.forward, "backward": run.backward}
        if device == "cuda" and not row["note"]:
            _call(run, device)
            one, row["note"] = graphed(one)
        steps.append(one)
    if device == "cuda" and not row["note"] and not case.dropout:
        for step in steps[0].values():
            step()
        check(case, runs[0].results, exact[adapters], precision.tolerance)
    return steps, row


def _call(run: Run, device: str) -> None:
    """Once; on a GPU beside the default stream, so that a graph can be captured afterwards."""
    with beside_default_stream(device):
        run.forward()
        run.backward()


def _peak_memory(run: Run, device: str) -> int | None:
    """Bytes that forward and backward take beside the inputs, results included."""
    if device == "cpu":
        return None
    _call(run, device)
    run.results = {}
    return peak_bytes(lambda: _call(run, device), device)


def _route(case: Case, precision: Precision, tensors: Sequence[Tensor], device: str) -> str:
    x, weight, _, lora_A, *_ = tensors
    with precision.casting(device):
        return ops.lora_linear_route(x, weight, lora_A, dropout_p=case.dropout).route


def _key(case: Case, precision: Precision, options: Options) -> dict[str, Any]:
    return {"case": case.name, "precision": precision.name, "frozen": options.frozen}


def measure(
    cases: Sequence[Case],
    precisions: Sequence[Precision],
    options: Options,
    *,
    title: str,
    command: str,
    name: str,
    folder: Path | None,
    budget: Budget,
    resume: bool = False,
) -> list[dict[str, Any]]:
    """Measures all cases, and writes name.json after each and the tables name.md at the end."""
    here = machine(options.device)
    record = {"title": title, "command": command, "machine": here}
    path = None if folder is None else folder / f"{name}.json"
    done = _finished(path, here, options.names) if resume and path is not None else []
    known = {(r["case"], r["precision"], r["frozen"]): r for r in done}
    records = []
    for precision in precisions:
        for case in cases:
            key = _key(case, precision, options)
            found = known.get(tuple(key.values()))
            if found is None and budget.allows(NEEDED[""]):
                print(f"{case.name}, {precision.name}", file=sys.stderr, flush=True)
                found = measure_case(case, precision, options, budget)
                gc.collect()
                if options.device == "cuda":
                    torch.cuda.empty_cache()
            elif found is None:
                rows = {n: {"status": LEFT_OUT} for n in options.names}
                found = {**key, "route": "", "rows": rows}
            records.append(found)
            if path is not None:
                write_json(path, {**record, "rows": records})
    text = layer_tables({**record, "rows": records})
    print(text)
    if folder is not None:
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
    return records


def _finished(path: Path, here: dict[str, str], names: Sequence[str]) -> list[dict[str, Any]]:
    """The records of an earlier run on this machine that have a result for every name."""
    if not path.exists():
        return []
    earlier = read_json(path)
    try:
        there = earlier["machine"] | {"date": here["date"]}
        rows: list[dict[str, Any]] = earlier["rows"]
    except (KeyError, TypeError):
        raise RunError(f"--resume: {path} holds no results; remove it first") from None
    if there != here:
        raise RunError(f"--resume: {path} was measured on another machine; remove it first")
    missing = {"status": LEFT_OUT}
    return [r for r in rows if all(r["rows"].get(n, missing) != missing for n in names)]


BASELINE_GROUPS: Mapping[str, Iterable[str]] = {
    "eager": EAGER,
    "routes": ROUTES,
    "compiled": COMPILED,
}


@dataclass(frozen=True)
class Settings(cli.NamedSettings):
    """Settings of this benchmark."""

    cases: tuple[str, ...] | None = option(
        None,
        help="groups of cases, goal for those with a goal, or a case's full name (default: cpu or, "
        "with --device cuda, goal)",
    )
    precisions: tuple[str, ...] = option(("fp32",), choices=tuple(PRECISIONS), help="dtypes")
    baselines: tuple[str, ...] = option(
        ("eager",),
        choices=(*BASELINE_GROUPS, *BASELINES),
        help="versions of the layer, or groups of them; dense is always there",
    )
    frozen: bool = option(False, help="no gradients of W and bias")
    budget_seconds: float | None = option(
        None, help="begin nothing that would take longer (default: no limit)"
    )
    resume: bool = option(False, help="keep what the files of --write already hold")

    def __post_init__(self) -> None:
        super().__post_init__()
        select(self.case_words())
        if self.budget_seconds is not None:
            check_positive("layers", "--budget-seconds", self.budget_seconds)
        if self.resume and self.write is None:
            raise ValueError("argument --resume: needs --write, the folder to go on with")

    def case_words(self) -> Sequence[str]:
        """What is given for `select`."""
        return self.cases or ["cpu" if self.device == "cpu" else "goal"]


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints the tables."""
    settings = cli.parse(Settings, argv, "layers", __doc__)
    device = settings.device
    words = (BASELINE_GROUPS.get(word, [word]) for word in settings.baselines)
    names = [FLOOR, *(name for word in words for name in word)]
    cases = select(settings.case_words())
    precisions = [PRECISIONS[name] for name in settings.precisions]
    options = Options(tuple(dict.fromkeys(names)), device, settings.frozen)
    if device == "cuda":
        options = replace(options, seconds_a_turn=0.005)
    if settings.smoke:
        cases = [case.shrunk() for case in dict.fromkeys((cases[0], cases[-1]))]
        options = replace(options, rounds=2, seconds_a_turn=0.0)
    where = "the CPU" if device == "cpu" else "a GPU"
    weights = "W frozen" if settings.frozen else "W trainable"
    tiny = ", at most 24 features and rows a task" if settings.smoke else ""
    measure(
        cases,
        precisions,
        options,
        title=f"Multi-task LoRA layer on {where}, {weights}: forward + backward{tiny}",
        command=cli.command("layers", argv),
        name=settings.name or f"layers_{device}",
        folder=settings.write,
        budget=Budget(settings.budget_seconds or math.inf),
        resume=settings.resume,
    )


if __name__ == "__main__":
    main()
