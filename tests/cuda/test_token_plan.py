"""How the token route's rows are cut into blocks."""

from __future__ import annotations

import subprocess
from itertools import accumulate
from math import ceil
from pathlib import Path

import pytest

from benchmarks.lib.cost_model import PLANNED_PROCESSORS, token_block_rows
from tests.shim import build

# Rows of each task, rows of a tile, blocks that are wanted, processors.
CASES = [
    (rows, tile, wanted, 132)
    for rows in (
        *((6400,) * 10, (20480,) * 10, (20480,) * 4, (160 * 128,)),
        *((1024,) * 4, (2048,) * 4, (4096,) * 4, (512,) * 16, (131072,) * 4),
        *((30, 0, 17, 5), (), (1,), (64000, 1, 0), tuple(range(100, 3000, 31)), (7,) * 600),
    )
    for tile in (16, 64)
    for wanted in (132, 264, 1056)
]


def busiest(rows: tuple[int, ...], block: int, processors: int) -> float:
    """Rows of the processor with the most of them, relative to the mean."""
    blocks = sum(ceil(n / block) for n in rows)
    return ceil(blocks / processors) * block * processors / sum(rows)


def test_blocks_are_those_of_the_cost_model(tmp_path: Path) -> None:
    if not build.has_compiler():
        pytest.skip(f"{build.COMPILER} was not found")
    calls = "\n".join(
        f"say({{{', '.join(map(str, accumulate(rows, initial=0)))}}}, {', '.join(map(str, rest))});"
        for rows, *rest in CASES
    )
    (tmp_path / "plan.cpp").write_text(
        f'#include <cstdio>\n#include <vector>\n#include "{build.CUDA / "token_plan.h"}"\n'
        "void say(std::vector<int64_t> ends, int64_t tile, int64_t wanted, int64_t processors) {\n"
        "  const auto tasks = static_cast<int64_t>(ends.size()) - 1;\n"
        "  using metalora::cuda::token_block_rows;\n"
        '  std::printf("%ld\\n", token_block_rows(ends.data(), tasks, tile, wanted, processors));\n'
        "}\n"
        f"static_assert(metalora::cuda::kPlannedProcessors == {PLANNED_PROCESSORS});\n"
        f"int main() {{\n{calls}\n}}\n"
    )
    program = tmp_path / "plan"
    command = [build.COMPILER, "-std=c++20", tmp_path / "plan.cpp", "-o", program]
    subprocess.run(command, check=True)
    found = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    assert list(map(int, found)) == [token_block_rows(*case) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_are_whole_tiles_and_about_as_many_as_are_wanted(
    case: tuple[tuple[int, ...], int, int, int],
) -> None:
    rows, tile, wanted, processors = case
    block = token_block_rows(*case)
    usual = tile * max(sum(rows) // tile // wanted, 1)
    assert block % tile == 0
    if block != usual:
        assert wanted / 2 <= sum(ceil(n / block) for n in rows) <= 2 * wanted
        assert busiest(rows, block, processors) < busiest(rows, usual, processors)


@pytest.mark.parametrize(
    ("rows", "before", "after"),
    [
        ((6400,) * 10, 1.19, 1.06),  # case a, 40 tokens a sequence
        ((20480,) * 10, 1.49, 1.08),  # and 128
        ((20480,) * 4, 1.24, 1.04),
        ((4096,) * 4, 1.04, 1.04),  # case b with 16,384 rows
        ((2048,) * 4, 1.04, 1.04),
        ((1024,) * 4, 2.07, 2.07),  # 64 tiles of 64 rows, for 132 processors
    ],
)
def test_the_busiest_processor_has_little_more_than_the_others(
    rows: tuple[int, ...], before: float, after: float
) -> None:
    usual = 64 * max(sum(rows) // 64 // 264, 1)
    assert busiest(rows, usual, 132) == pytest.approx(before, abs=0.01)
    assert busiest(rows, token_block_rows(rows, 64, 264, 132), 132) == pytest.approx(
        after, abs=0.01
    )
