"""The largest difference of any loss, weight or adapter after any step, against one process.

    python -m tests.meta.equality --write benchmarks/results

trains every case of `tests.meta.test_distribution` in float64 on one, two and three processes.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.tables import write_table
from tests.meta.test_distribution import every_case
from tests.processes import run_processes


def largest_difference(found: list[Any], wanted: list[Any]) -> float:
    """Of the steps of one process and those of all."""
    largest = 0.0
    for ours, theirs in zip(found, wanted, strict=True):
        pairs = [(ours[0], theirs[0])]
        for part in (1, 2):
            pairs += [(value, theirs[part][place]) for place, value in ours[part].items()]
        largest = max([largest, *(float((a - b).abs().max()) for a, b in pairs)])
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="folder to write the table to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    one = every_case()
    several = [run_processes(every_case, count) for count in (2, 3)]
    rows: list[list[Any]] = []
    for (case, parallel), wanted in one.items():
        row = [
            max(largest_difference(own[case, parallel]["steps"], wanted["steps"]) for own in found)
            for found in several
        ]
        rows.append([case, parallel, *row])
    command = shlex.join(["python", "-m", "tests.meta.equality", *sys.argv[1:]])
    header = ["training", "parallel", "two processes", "three processes"]
    shown = [[case, kind, *(f"{one:.0e}" for one in rest)] for case, kind, *rest in rows]
    title = "The largest difference to one process, after any step"
    write_table("equality", title, command, header, shown, rows, given.write)


if __name__ == "__main__":
    main()
