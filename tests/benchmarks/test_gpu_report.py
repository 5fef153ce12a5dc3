"""The report of a GPU, as far as it can be had without one."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from benchmarks import (
    ceilings,
    gpu_report,
    language,
    linear_training,
    model,
    shallow_training,
    steps,
    task_matvec,
    tune,
)
from benchmarks.gpu_report import Part, parts, run
from benchmarks.lib.operators import Settings
from benchmarks.lib.registry import benchmarks
from benchmarks.lora_linear import BENCHMARK
from experiments.lib.cli import parse

pytestmark = pytest.mark.slow


def python(code: str, **changes: object) -> Part:
    return Part("part", [sys.executable, "-c", code], **changes)  # type: ignore[arg-type]


def exit_code(module: ModuleType, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    return int(ended.value.code or 0)


@pytest.mark.exhaustive
def test_parts_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call = ["--device", "cpu", "--smoke", "--out", str(tmp_path), "--part"]
    assert exit_code(gpu_report, *call, "first", "routes", "sanitize-layers-memcheck") == 0
    table = tmp_path / "lora_linear_cpu_routes.json"
    record = json.loads(table.read_text())
    rows = [row for one in record["rows"] for row in one["rows"].values()]
    assert len(record["rows"]) == 4 and all(row["status"] == "timed" for row in rows)
    page = table.with_suffix(".md").read_text()
    assert page in (tmp_path / "routes.log").read_text()

    # The profile's file is none of those that can be drawn.
    assert exit_code(task_matvec, "--smoke", "--profile", "--write", str(tmp_path)) == 0
    assert exit_code(gpu_report, *call, "plot", "predicted") == 0
    assert len(list(tmp_path.glob("*.png"))) == 3
    assert "Predicted, not measured" in (tmp_path / "predicted.log").read_text()
    summary = (tmp_path / "gpu_report.md").read_text()
    assert (
        "| sanitize-layers-memcheck | not run | 0 | there is nothing to sanitize on a CPU |"
        in summary
    )
    assert "| routes | done |" in summary and "| plot | done |" in summary
    assert summary in capsys.readouterr().out


def test_every_part_that_measures_takes_its_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = []
    for part in parts("cuda", tmp_path, smoke=True, resume=True):
        module = part.command[2].removeprefix("benchmarks.")
        known = {**benchmarks(), "ceilings": ceilings.BENCHMARK, "steps": steps.BENCHMARK}
        if module in known:
            given = parse(Settings, part.command[3:], prog="")
            benchmark = known[module]
            assert all(given.selected(benchmark))
            assert given.smoke and given.device == "cuda"
            if module != "ceilings" and not given.profile:
                assert given.resume and given.budget_seconds < part.limit <= 480
        elif module == "tune":
            tuned = parse(tune.Settings, part.command[3:], prog="")
            assert tuned.device == "cuda" and tuned.budget_seconds < part.limit
        elif module == "language":
            rounds = parse(language.Settings, part.command[3:], prog="")
            assert (rounds.tasks, rounds.turns, rounds.precision) == (10, 8, "bf16")
            assert rounds.model in language.SIZES and rounds.data is None
        else:
            continue
        found.append(part.name)
    assert len(found) >= 20 and set(benchmarks()) - {"lora_linear"} <= set(found)


def test_only_a_measurement_on_a_gpu_changes_the_table_and_is_built(tmp_path: Path) -> None:
    for device, smoke in (("cuda", False), ("cuda", True), ("cpu", True)):
        named = {part.name: part for part in parts(device, tmp_path, smoke=smoke)}
        assert ("--install" in named["tune"].command) == (device == "cuda" and not smoke)
        assert named["build-tuned"].command == named["build"].command
        assert not named["tune"].missing
        order = [*named]
        assert order.index("tune") + 1 == order.index("build-tuned") < order.index("layers-a")


def test_on_a_cpu_there_is_nothing_to_tune(tmp_path: Path) -> None:
    (part,) = (p for p in parts("cpu", tmp_path) if p.name == "tune")
    assert run(part, tmp_path).note == "there is nothing to tune on a CPU"


def test_the_first_part_is_short_and_has_a_case_of_each_route(tmp_path: Path) -> None:
    part = parts("cuda", tmp_path)[1]
    assert part.name == "first" and part.limit == 180
    names = part.command[part.command.index("--cases") + 1 : part.command.index("--precisions")]
    routes = {model.predict(case, "autocast").route for case in BENCHMARK.select(names)}
    assert routes == {"weight", "token"}


def test_max_autotune_is_measured_beside_metalora_where_there_is_a_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    compiled = [p for p in parts("cuda", tmp_path) if p.name.startswith("compiled")]
    names = {c.name for group in gpu_report.HEADLINES.values() for c in BENCHMARK.select(group)}
    assert len(names) == 4 and len(compiled) == 4
    for part in compiled:
        given = parse(Settings, part.command[3:], prog="")
        assert given.baselines == ("metalora", "merged", "compiled")


@pytest.mark.parametrize("tool", gpu_report.TOOLS)
@pytest.mark.parametrize("what", ["layers", "trainers"])
def test_sanitizer(what: str, tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: None)
    part = next(p for p in parts("cuda", tmp_path) if p.name == f"sanitize-{what}-{tool}")
    outcome = run(part, tmp_path)
    assert outcome.status == "not run"
    assert "compute-sanitizer is not on the PATH" in outcome.note
    monkeypatch.setattr(gpu_report.shutil, "which", lambda name: name)
    part = next(p for p in parts("cuda", tmp_path) if p.name == f"sanitize-{what}-{tool}")
    command = " ".join(part.command)
    assert part.missing == "" and part.tests
    assert f"--tool {tool} --error-exitcode {gpu_report.FOUND_ERRORS}" in command
    files = {"layers": gpu_report.LAYER_TESTS, "trainers": gpu_report.TRAINER_TESTS}[what]
    assert f"-m pytest {' '.join(files)} -m gpu" in command
    assert all((gpu_report.ROOT / file).exists() for file in files)


def test_a_part_that_fails_says_how(tmp_path: Path) -> None:
    outcome = run(python("print('its output'); raise SystemExit(86)"), tmp_path)
    assert (outcome.status, outcome.note) == ("failed", "exit code 86")
    assert "its output" in (tmp_path / "part.log").read_text()


def test_tests_that_are_all_skipped_are_no_success(tmp_path: Path) -> None:
    skipped = python("print('== 7 skipped in 1.2s ==')", tests=True)
    assert run(skipped, tmp_path).note == "no test passed; 7 skipped in 1.2s"
    assert run(skipped, tmp_path).status == "failed"
    assert run(python("print('hello')", tests=True), tmp_path).note == "pytest counted no tests"
    passed = run(python("print('== 5 passed, 7 skipped in 1s ==')", tests=True), tmp_path)
    assert (passed.status, passed.note) == ("done", "5 passed, 7 skipped in 1s")


def test_a_part_is_ended_with_its_children(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(mark)!r}).touch()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run(replace(python(code), limit=1), tmp_path)
    assert (outcome.status, outcome.note) == ("failed", "ended after 1 s")
    time.sleep(2)
    assert not mark.exists()


def test_the_whole_fails_where_a_part_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = replace(python("raise SystemExit(1)"), name="build")
    monkeypatch.setattr(gpu_report, "parts", lambda *a, **k: [failing])
    assert exit_code(gpu_report, "--out", str(tmp_path), "--part", "build") == 1


@pytest.mark.parametrize(
    ("module", "flags"),
    [
        (ceilings, ()),
        (task_matvec, ("--profile", "--precisions", "fp64")),
        (linear_training, ("--cases", "fine-tuning", "--baselines", "all", "--threads", "1")),
        (shallow_training, ("--cases", "fine-tuning, 10 at once", "--baselines", "all")),
    ],
)
def test_the_other_tables(module, flags: tuple[str, ...], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert exit_code(module, "--smoke", "--write", str(tmp_path), *flags) == 0
    torch.set_num_threads(threads)
    (table,) = tmp_path.glob("*.json")
    record = json.loads(table.read_text())
    assert record["rows"] and record["machine"]["torch"]
    page = table.with_suffix(".md").read_text()
    assert record["command"] in page and ": failed" not in page and ": wrong" not in page
