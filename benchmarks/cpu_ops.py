"""Forward + backward of `lora_linear` on the CPU beside the loop over tasks and its bmm form.

python -m benchmarks.cpu_ops [--routes] [--write benchmarks/results]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from benchmarks.baselines import LAYERS, check, forward_backward, metalora_layer
from benchmarks.measure import side_by_side, write_table
from benchmarks.registry import CPU_CASES, Case, equal
from metalora import ops


def compare(folder: Path | None) -> None:
    rows, data = [], []
    for case in CPU_CASES:
        tensors = case.tensors()
        candidates = {}
        for name, make in LAYERS.items():
            check(case, name)
            candidates[name] = partial(forward_backward, make(case), tensors)
        timings = side_by_side(candidates)
        ours = timings["metalora"]
        best = min(timings["loop"].median, timings["bmm"].median)
        route = ops.lora_linear_route(*_shapes(case)).route
        rows.append(
            [
                case.name,
                route,
                f"{ours.median * 1e6:.0f} ({ours.low * 1e6:.0f}-{ours.high * 1e6:.0f})",
                *(
                    f"{timings[name].median / ours.median:.2f}x"
                    for name in ("loop", "bmm", "dense")
                ),
                f"{best / ours.median:.2f}x",
            ]
        )
        data.append(
            {"case": case.name, "route": route, **{n: asdict(t) for n, t in timings.items()}}
        )
    write_table(
        "cpu_ops",
        "lora_linear, forward + backward on the CPU, float32: time relative to metalora",
        "python -m benchmarks.cpu_ops --write benchmarks/results",
        [
            "case",
            "route",
            "metalora, µs (quartiles)",
            "loop",
            "bmm",
            "dense floor",
            "best baseline",
        ],
        rows,
        data,
        folder,
    )


def compare_routes(folder: Path | None) -> None:
    rows, data = [], []
    for in_features, out_features in (
        (64, 64),
        (64, 256),
        (256, 64),
        (256, 256),
        (512, 256),
        (768, 768),
    ):
        for rank in (1, 8):
            for per_task in (32, 128, 512, 2048):
                case = equal(4, in_features, out_features, rank, per_task)
                tensors = case.tensors()
                timings = side_by_side(
                    {
                        route: partial(forward_backward, metalora_layer(case, route), tensors)
                        for route in ("weight", "token")
                    },
                    rounds=9,
                )
                ratio = timings["token"].median / timings["weight"].median
                unit = per_task * (in_features + out_features) / (in_features * out_features)
                chosen = ops.lora_linear_route(*_shapes(case)).route
                rows.append([case.name, f"{unit:.1f}", f"{ratio:.2f}", chosen])
                data.append({"case": case.name, "token_over_weight": ratio, "auto": chosen})
    write_table(
        "cpu_routes",
        "lora_linear on the CPU: token route relative to weight route",
        "python -m benchmarks.cpu_ops --routes --write benchmarks/results",
        ["case", "rows a task / (in·out/(in+out))", "token / weight", "auto takes"],
        rows,
        data,
        folder,
    )


def _shapes(case: Case) -> list[torch.Tensor]:
    x, weight, _, lora_A, *_ = case.tensors()
    return [x, weight, lora_A]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--routes", action="store_true", help="compare the two native routes")
    parser.add_argument("--write", type=Path, metavar="DIR", help="also write the tables here")
    arguments = parser.parse_args()
    if arguments.routes:
        compare_routes(arguments.write)
    else:
        compare(arguments.write)


if __name__ == "__main__":
    main()
