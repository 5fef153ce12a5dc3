"""The report of a GPU, as far as it can be had without one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
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
from benchmarks.lib import cli
from benchmarks.lib.operators import Settings
from benchmarks.lib.registry import benchmarks
from benchmarks.lora_linear import BENCHMARK
from experiments.lib.cli import parse

pytestmark = pytest.mark.slow


def python(code: str, name: str = "part", **changes: object) -> Part:
    return Part(name, [sys.executable, "-c", code], **changes)  # type: ignore[arg-type]


def ended(process: int) -> bool:
    """Whether the process has ended, perhaps as one that init has not seen to yet, or soon does."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def exit_code(module: ModuleType, *arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        module.main(arguments)
    return int(ended.value.code or 0)


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cli, "check_kernels", lambda device: None)


@pytest.fixture
def of_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts other parts in the place of the report's own, with what is left of the time in them."""

    def replace_parts(*made: Part) -> None:
        monkeypatch.setattr(gpu_report, "PARTS", tuple(part.name for part in made))
        monkeypatch.setattr(gpu_report, "parts", lambda *_, **__: list(made))

    return replace_parts


@pytest.mark.exhaustive
def test_parts_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call = ["--device", "cpu", "--smoke", "--deadline-seconds", "3000", "--out", str(tmp_path)]
    call += ["--part"]
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
    pretend_gpu(monkeypatch)
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
    part = parts("cuda", tmp_path)[2]
    assert part.name == "first" and part.limit == 180
    names = part.command[part.command.index("--cases") + 1 : part.command.index("--precisions")]
    routes = {model.predict(case, "autocast").route for case in BENCHMARK.select(names)}
    assert routes == {"weight", "token"}


def test_max_autotune_is_measured_beside_metalora_where_there_is_a_goal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_gpu(monkeypatch)
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


def test_the_report_needs_no_package_that_a_bare_machine_lacks(tmp_path: Path) -> None:
    code = "import sys; sys.modules['cyclopts'] = None\nfrom benchmarks import gpu_report\n"
    code += "gpu_report.main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--part", "sanitize-layers-memcheck"],
        cwd=gpu_report.ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "there is nothing to sanitize on a CPU" in done.stdout


def test_absent_packages_are_named_with_the_wheels_to_carry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = importlib.util.find_spec
    hidden = ("cyclopts", "peft")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )
    every = {part.name: part for part in parts("cuda", tmp_path)}
    assert run(every["first"], tmp_path).note == "not installed: cyclopts"
    assert run(every["steps"], tmp_path).note == "not installed: cyclopts, peft"
    assert not gpu_report.absent(every["build"]) and not gpu_report.absent(every["test-gpu"])
    call = ["--device", "cpu", "--out", str(tmp_path), "--part"]
    assert exit_code(gpu_report, *call, "first", "steps") == 0
    first_line = capsys.readouterr().out.splitlines()[0]
    assert first_line.startswith("not installed: cyclopts, peft; where nothing can be fetched")
    assert "-d .whl cyclopts docstring-parser rich-rst peft`" in first_line
    assert exit_code(gpu_report, *call, "sanitize-layers-memcheck") == 0
    assert "not installed" not in capsys.readouterr().out.splitlines()[0]


def test_what_a_machine_must_have_is_known_of_all_parts(tmp_path: Path) -> None:
    for part in parts("cuda", tmp_path):
        assert part.packages, part.name
        assert set(part.packages) <= set(gpu_report.PACKAGES)


def test_the_gpu_is_tested_right_after_the_build_and_all_else_last(tmp_path: Path) -> None:
    every = parts("cuda", tmp_path)
    assert [part.name for part in every[:3]] == ["build", "test-gpu", "first"]
    assert every[0].environment["TORCH_CUDA_ARCH_LIST"] == "native"
    assert every[1].limit == 150 and "--continue-on-collection-errors" in every[1].command
    assert every[-1].name == "test" and "--continue-on-collection-errors" in every[-1].command
    assert parts("cpu", tmp_path)[1].missing == "these tests need a GPU"


def test_all_files_with_tests_for_a_gpu_are_named() -> None:
    """A mark, a fixture's mark or a file's: as the files of this folder write them."""
    marked = re.compile(r"mark\.gpu\b")
    device = re.compile(r"^def test_\w+\([^)]*\bdevice: torch\.device", re.MULTILINE)
    tests = gpu_report.ROOT / "tests"
    found = set()
    for path in tests.rglob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        if marked.search(text) or ("cuda" in path.parts and device.search(text)):
            found.add(str(path.relative_to(gpu_report.ROOT)))
    assert found == set(gpu_report.GPU_TESTS)


def test_benchmarks_plan_for_what_is_left_of_the_time(tmp_path: Path) -> None:
    def budget(left: float) -> list[int]:
        found = []
        for part in parts("cuda", tmp_path, left=left):
            if "--budget-seconds" in part.command:
                value = int(part.command[part.command.index("--budget-seconds") + 1])
                found.append(value)
                assert value < min(part.limit, left)
        return found

    assert budget(60)[:2] == [46, 47]
    assert budget(1e9)[:2] == [gpu_report.FIRST_BUDGET, gpu_report.BUDGET]


def test_nothing_follows_a_build_that_failed(
    of_parts: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "for i in range(60): print(f'line {i}')\nraise SystemExit(3)"
    after = python(f"open({str(tmp_path / 'mark')!r}, 'w')", "after")
    of_parts(python(code, "other"), python(code, "build"), after)
    archive = tmp_path / "elsewhere" / "report.tgz"
    call = ["--out", str(tmp_path / "out"), "--archive", str(archive)]
    assert exit_code(gpu_report, *call) == 1
    printed = capsys.readouterr().out
    assert not (tmp_path / "mark").exists()
    assert "| after | not run | 0 | build failed |" in printed
    assert printed.count("  | line 59\n") == 2 and "line 20\n" in printed
    assert "line 19\n" not in printed
    with tarfile.open(archive) as files:
        assert set(files.getnames()) == {
            *("build.log", "other.log", "gpu_report.json", "gpu_report.md")
        }


def test_the_time_is_that_of_all_parts(
    of_parts: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    of_parts(python("import time; time.sleep(60)"), python("", "after"))
    start = time.monotonic()
    assert exit_code(gpu_report, "--out", str(tmp_path), "--deadline-seconds", "16") == 1
    assert time.monotonic() - start < 55
    printed = capsys.readouterr().out
    assert "| part | failed | 16 | ended after 16 s |" in printed
    assert "| after | not run | 0 | the 16 s were over |" in printed


def test_a_report_that_is_ended_ends_its_part_and_leaves_what_it_has(tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = out / "two.log"
    part = "import os, time; print('begun', os.getpid(), flush=True); time.sleep(600)"
    code = (
        "import sys\nfrom benchmarks import gpu_report\nfrom benchmarks.gpu_report import Part\n"
        f"made = [Part('one', [sys.executable, '-c', 'print(1)']), "
        f"Part('two', [sys.executable, '-c', {part!r}])]\n"
        "gpu_report.PARTS = ('one', 'two')\ngpu_report.parts = lambda *_, **__: made\n"
        "gpu_report.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "--out", str(out), "--archive", str(out / "report.tgz")]
    with subprocess.Popen(
        command, cwd=gpu_report.ROOT, stdout=subprocess.PIPE, text=True
    ) as report:
        assert report.stdout is not None
        text = ""
        while not (begun := re.search(r"^begun (\d+)\n", text, re.M)):
            assert report.poll() is None
            time.sleep(0.05)
            text = log.read_text() if log.exists() else ""
        os.kill(report.pid, signal.SIGTERM)
        told = report.stdout.read()
    assert report.returncode == 128 + signal.SIGTERM
    assert told.splitlines()[-1] == "two …"
    record = json.loads((out / "gpu_report.json").read_text())
    assert [(one["part"], one["status"]) for one in record] == [("one", "done"), ("two", "running")]
    with tarfile.open(out / "report.tgz") as files:
        kept = files.extractfile("two.log")
        assert kept is not None and begun[0].encode() in kept.read()
    assert ended(int(begun[1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--deadline-seconds", "0"], "--deadline-seconds: must be > 0, got 0.0"),
        (["--device", "cdua"], "--device: invalid choice: 'cdua'"),
        (["--out", "/dev/null/x"], "--out: /dev/null/x: Not a directory"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(gpu_report, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_a_gpu_is_not_measured_without_our_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(cli, "gpu_problem", lambda index: "the native CUDA library is not built")
    with pytest.raises(ValueError, match="nothing of metalora's here: the native CUDA library is"):
        Settings(device="cuda")
    monkeypatch.setattr(cli, "gpu_problem", lambda index: None)
    assert Settings(device="cuda").device == "cuda"


def test_a_part_is_ended_with_its_children(tmp_path: Path) -> None:
    child = "import os, time; print('child', os.getpid(), flush=True); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run(replace(python(code), limit=5), tmp_path)
    assert (outcome.status, outcome.note) == ("failed", "ended after 5 s")
    begun = re.search(r"^child (\d+)\n", (tmp_path / "part.log").read_text(), re.M)
    assert begun is not None
    assert ended(int(begun[1]))


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
