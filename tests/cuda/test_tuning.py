"""The table of launches: what is chosen from it, and that other choices give the same results."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import tune
from benchmarks.lib import tuning
from benchmarks.lib.measure import Budget
from experiments.lib.errors import RunError
from tests.shim import build

pytestmark = pytest.mark.slow

ROWS = tuning.read_table()


@pytest.fixture
def library(cache: Path, shim_operators: Any) -> tune.Library:
    made = tune.Library(build.operators(cache), shim_operators, "cpu")
    assert made.table() == [row.choice for row in ROWS]
    return made


def test_the_kernels_choose_as_the_cost_model_does(tmp_path: Path) -> None:
    if not build.has_compiler():
        pytest.skip(f"{build.COMPILER} was not found")
    cases = [
        (row.what, row.element, rank) for row in ROWS for rank in (1, 8, 16, 17, 64, 65, 128, 4096)
    ]
    calls = "\n".join(
        f"say(tuned(Tuned::{what}, {element}, {rank}));" for what, element, rank in cases
    )
    (tmp_path / "main.cpp").write_text(
        f'#include <cstdio>\n#include "{build.CUDA / "tuning.h"}"\n'
        "using namespace metalora::cuda;\n"
        'void say(Choice c) { std::printf("%ld %ld\\n", c.blocks, c.depth); }\n'
        f"int main() {{\n{calls}\n}}\n"
    )
    command = [build.COMPILER, "-std=c++20", tmp_path / "main.cpp", build.CUDA / "tuning.cpp"]
    subprocess.run([*command, "-o", tmp_path / "main"], check=True)
    found = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=True).stdout
    wanted = [tuning.chosen(*case).choice for case in cases]
    assert [tuple(map(int, line.split())) for line in found.splitlines()] == wanted


def test_a_table_is_read_as_written(tmp_path: Path) -> None:
    changed = [replace(row, blocks=row.blocks + 1, depth=row.depth + 2) for row in ROWS]
    path = tmp_path / tuning.TABLE.name
    tuning.write_table(path, changed, "a GPU")
    assert tuning.read_table(path) == tuple(changed)
    assert "// Measured on: a GPU.\n" in path.read_text()
    tuning.write_table(path, ROWS, "nothing yet; these are guesses")
    assert path.read_text() == tuning.TABLE.read_text()


@pytest.mark.parametrize("row", range(len(ROWS)), ids=[row.name for row in ROWS])
def test_other_choices_give_the_same_results(library: tune.Library, row: int) -> None:
    """Buffers of a tile change no bit, and other blocks only how sums are rounded."""
    torch.manual_seed(0)
    one = ROWS[row]
    try:
        for problem in tune.problems(one, library, smoke=True):
            exact = [t.clone() for t in problem()]
            for blocks, depth in ((1, one.depth), (3, 1), (one.blocks, 4)):
                library.change(row, (blocks, depth))
                got = [t.clone() for t in problem()]
                tolerance = tune.TOLERANCES[one.element]
                assert all(tune._agree(a, b, tolerance) for a, b in zip(got, exact, strict=True))
                same = all(torch.equal(a, b) for a, b in zip(got, problem(), strict=True))
                assert same
                if one.what == "token_rows" and blocks == one.blocks:
                    assert all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))
    finally:
        library.change(row, one.choice)


def test_the_tuner_takes_what_is_quicker_and_leaves_out_what_is_wrong(
    library: tune.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = next(i for i, row in enumerate(ROWS) if row.what == "task_matvec")
    calls: list[tuple[int, ...]] = []

    def problem() -> list[torch.Tensor]:
        blocks = library.table()[index][0]
        calls.append((blocks,))
        for _ in range(blocks // 256):  # 128 is the quickest that is right
            torch.randn(300, 300) @ torch.randn(300, 300)
        return [torch.full((2,), 2.0 if blocks == 1024 else 1.0)]

    monkeypatch.setattr(tune, "problems", lambda *_: [problem])
    record = tune.tune_row(library, index, ROWS[index], smoke=False)
    assert record["best"] == (128, 0) and record["relative"] < tune.GAIN
    assert record["wrong"] == ["(1024, 0)"]
    assert library.table()[index] == ROWS[index].choice


def test_the_command_tries_every_row(
    library: tune.Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "shim_library", lambda: library)
    before = tuning.TABLE.read_text()
    with pytest.raises(SystemExit) as ended:
        tune.main(["--device", "cpu", "--smoke", "--write", str(tmp_path)])
    assert not ended.value.code
    page = (tmp_path / "tune_cpu.md").read_text()
    assert all(f"| {row.name} |" in page for row in ROWS) and "not measured" not in page
    assert [row.name for row in tuning.read_table(tmp_path / "tuning_table.h")] == [
        row.name for row in ROWS
    ]
    assert tuning.TABLE.read_text() == before


def test_rows_that_do_not_fit_stay_as_they_are(library: tune.Library) -> None:
    rows, records = tune.tune(library, True, Budget(0))
    assert tuple(rows) == ROWS and records == []


def test_a_library_of_another_table_is_refused(library: tune.Library) -> None:
    library.change(0, (7, 2))
    try:
        with pytest.raises(RunError, match=r"is not of this tuning_table\.h; build it"):
            tune.tune(library, True, Budget())
    finally:
        library.change(0, ROWS[0].choice)
    with pytest.raises(RunError, match="has no row 99"):
        library.change(99, (1, 1))


def test_only_a_gpu_changes_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu"])
    assert "a CPU can only try the code, with --smoke" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tune.main(["--device", "cpu", "--smoke", "--install"])
    assert "argument --install: only what a GPU has measured" in capsys.readouterr().err
