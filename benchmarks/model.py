"""Predicts the time of `lora_linear` beside a dense layer on a GPU from what either moves.

python -m benchmarks.model                                  # the cases with a goal
python -m benchmarks.model --cases a b --precisions autocast --copy 3000 --short 700
python -m benchmarks.model --cases "a 768→768 L40 T10 r8" --calls
python -m benchmarks.model --cases "a 768→768 L40 T10 r8" --readers 3  # queries, keys, values
python -m benchmarks.model --measured DIR/lora_linear_cuda_layers-a.json

Needs no GPU: bytes and operations of every kernel and product are counted, and divided by the
ceilings given; those that stand here by default are of an H200, and guesses until measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cases import PRECISIONS, Precision
from benchmarks.lib.cli import program
from benchmarks.lib.cost_model import (
    Call,
    Ceilings,
    Layer,
    calls_of_readers,
    dense_calls,
    layer_calls,
    seconds,
    table_rows,
)
from benchmarks.lib.tables import markdown, read_json
from benchmarks.lora_linear import BENCHMARK, LayerCase
from experiments.lib.cli import check_values, main_guard, option, parse
from metalora._checks import SHORT
from metalora.ops import ROUTES, choose_route
from metalora.ops.route import keeps_merged

HEADER = ["case", "precision", "route", "dense, µs", "metalora, µs", "relative"]


@dataclass(frozen=True)
class Settings:
    """Settings of the model."""

    cases: tuple[str, ...] = option(
        ("goal",), help="cases and groups, as of benchmarks.lora_linear"
    )
    precisions: tuple[str, ...] = option(("autocast",), help=f"of {', '.join(PRECISIONS)}")
    route: str = option("auto", choices=[r for r in ROUTES if r != "reference"], help="to predict")
    frozen: bool = option(False, help="no gradients of the shared weights")
    readers: int = option(1, help="layers that read the same x; casts of x count where there are 2")
    alone: bool = option(False, help="metalora's layers hand on nothing of x to one another")
    calls: bool = option(False, help="a table of all calls for each case")
    measured: tuple[Path, ...] = option((), help=".json files of benchmarks.lora_linear to compare")
    copy: float = option(4300, help="GB/s read and written")
    short: float = option(790, help="TFLOP/s of products in 16 bits")
    mma: float = option(200, help="TFLOP/s of the token route's kernels in 16 bits")
    tf32: float = option(395, help="TFLOP/s of products in TF32")
    fp32: float = option(50, help="TFLOP/s of products in float32")
    philox: float = option(1000, help="random numbers drawn, 10⁹ a second")
    launch: float = option(1.5, help="µs that a launch adds, as in the replay of a graph")
    processors: int = option(132, help="streaming multiprocessors")

    def __post_init__(self) -> None:
        check_values("settings", self)
        BENCHMARK.select(self.cases)
        unknown = [p for p in self.precisions if p not in PRECISIONS or p == "fp64"]
        if unknown:
            raise ValueError(f"argument --precisions: there is no model of {unknown[0]!r}")

    def ceilings(self) -> Ceilings:
        rates = {"short": self.short, "mma": self.mma, "tf32": self.tf32, "fp32": self.fp32}
        rates = {unit: 1e12 * rate for unit, rate in rates.items()}
        return Ceilings(
            1e9 * self.copy, rates, 1e9 * self.philox, 1e-6 * self.launch, self.processors
        )


@dataclass(frozen=True)
class Prediction:
    """Of one case: the calls, and the route."""

    case: str
    precision: str
    route: str
    dense: Sequence[Call]
    metalora: Sequence[Call]

    def times(self, ceilings: Ceilings) -> tuple[float, float]:
        """Seconds of the dense layer and of metalora's, forward and backward."""
        return seconds(self.dense, ceilings), seconds(self.metalora, ceilings)


def layer_of(case: LayerCase, precision: Precision, *, frozen: bool = False) -> Layer:
    """What the cost model has to know of a case."""
    if precision.activations in SHORT:
        unit = "short"
    else:
        unit = "tf32" if precision.tf32 else "fp32"
    return Layer(
        rows=case.rows,
        in_features=case.in_features,
        out_features=case.out_features,
        rank=case.rank,
        dropout=case.dropout,
        bias=True,
        parameter=precision.parameters.itemsize,
        activation=precision.activations.itemsize,
        unit=unit,
        keep_merged=keeps_merged(sum(case.rows), case.tasks, case.out_features),
        need_weight=not frozen,
    )


def predict(
    case: LayerCase,
    precision: str,
    route: str = "auto",
    *,
    frozen: bool = False,
    readers: int = 1,
    alone: bool = False,
) -> Prediction:
    """What ``readers`` layers of a case ask of a GPU whose memory is no limit.

    They are all given the same x, and share what they can of it unless they are ``alone``.
    """
    p = PRECISIONS[precision]
    if route == "auto":
        route = choose_route(
            rows=sum(case.rows),
            tasks=case.tasks,
            in_features=case.in_features,
            out_features=case.out_features,
            dropout_p=case.dropout,
            dtype=p.activations,
            weight_dtype=p.parameters,
            device_type="cuda",
        ).route
    layer = layer_of(case, p, frozen=frozen)
    calls_of = partial(layer_calls, route=route)
    dense, ours = dense_calls(layer), calls_of(layer)
    if readers > 1:
        dense = calls_of_readers(layer, dense_calls, readers, handed_on=False)
        ours = calls_of_readers(layer, calls_of, readers, handed_on=not alone)
    return Prediction(case.name, precision, route, dense, ours)


def measurements(files: Sequence[Path]) -> dict[tuple[str, str, bool], Mapping[str, Any]]:
    """The rows of versions by case, precision and whether W was frozen."""
    records = (record for file in files for record in read_json(file)["rows"])
    return {(r["case"], r["precision"], r["frozen"]): r["rows"] for r in records}


def _measured(rows: Mapping[str, Any]) -> list[str]:
    medians = [rows.get(name, {}).get("total", {}).get("median") for name in ("dense", "metalora")]
    if None in medians:
        return ["", "", ""]
    dense, ours = medians
    return [f"{1e6 * dense:,.0f}", f"{1e6 * ours:,.0f}", f"{ours / dense:.2f}"]


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the predictions."""
    settings = parse(Settings, argv, prog=program("model"), description=__doc__ or "")
    ceilings, found = settings.ceilings(), measurements(settings.measured)
    rows = []
    for precision in settings.precisions:
        for case in BENCHMARK.select(settings.cases):
            one = predict(
                case,  # type: ignore[arg-type]
                precision,
                settings.route,
                frozen=settings.frozen,
                readers=settings.readers,
                alone=settings.alone,
            )
            if settings.calls:
                for name, calls in (("dense", one.dense), (f"{one.route} route", one.metalora)):
                    print(f"{one.case}, {precision}, {name}\n")
                    header = ["call", "", "MB", "GFLOP", "µs"]
                    print(markdown(header, table_rows(calls, ceilings)) + "\n")
            dense, ours = one.times(ceilings)
            times = [f"{1e6 * dense:,.0f}", f"{1e6 * ours:,.0f}", f"{ours / dense:.2f}"]
            row = [one.case, precision, one.route, *times]
            if settings.measured:
                row += _measured(found.get((one.case, precision, settings.frozen), {}))
            rows.append(row)
    header = HEADER + ["dense, measured", "metalora, measured", "relative"] * bool(
        settings.measured
    )
    layers = f" of {settings.readers} layers that read the same x" if settings.readers > 1 else ""
    print(f"Predicted, not measured: forward and backward{layers}.\n")
    print(markdown(header, rows))
    print(
        f"\nCeilings: {settings.copy:g} GB/s; TFLOP/s: {settings.short:g} in 16 bits and "
        f"{settings.mma:g} in the token route's kernels, "
        f"{settings.tf32:g} in TF32, {settings.fp32:g} in float32; {settings.philox:g}e9 random "
        f"numbers a second; {settings.launch:g} µs a launch; {settings.processors} processors."
    )
    return 0


if __name__ == "__main__":
    main()
