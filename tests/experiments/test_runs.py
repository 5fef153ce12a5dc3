from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import metalora
from experiments.lib import cli, experiment, lock, runs
from experiments.lib.errors import RunError, divergence, too_large
from experiments.lib.machine import cpu_name
from experiments.lib.runs import RunFolder
from metalora._errors import DivergedError
from tests.processes import start_interruptible

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    seeds: tuple[int, ...] = (0, 1)
    out: Path | None = cli.option(None, run_only=True)


def create(out: Path, settings: Settings = Settings(), resume: bool = False) -> RunFolder:
    return RunFolder.create(out, settings, experiment="test", resume=resume)


def manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


def row(trial: int, value: float) -> dict:
    return {
        "experiment": "test",
        "method": "lora-ml",
        "trial": trial,
        "metric": "m",
        "value": value,
    }


def test_a_run_leaves_a_whole_folder(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        assert manifest(run.folder)["status"] == "running"
        run.add_data("digits", "ab" * 32)
        run.log(epoch=1, loss=torch.tensor(0.5), rates=np.array([1.0, np.nan]))
        run.add_rows([row(0, 0.1 + 0.2), row(1, float("nan"))])
        run.add_rows([row(2, 1e-30)])
        run.mark_done("all")
    seen = manifest(run.folder)
    assert seen["status"] == "completed"
    assert seen["settings"] == {"lr": 0.1, "seeds": [0, 1], "out": None}
    assert seen["data"] == {"digits": "ab" * 32}
    assert seen["wall_seconds"] >= 0
    assert {"versions", "git", "machine", "started", "ended", "command"} <= set(seen)
    assert {"python", "torch", "numpy", "metalora"} <= set(seen["versions"])
    assert seen["versions"]["native"] == metalora.build_info()
    lines = (run.folder / "results.csv").read_text().splitlines()
    assert lines[0] == "experiment,method,trial,metric,value"
    assert [float(line.split(",")[-1]) for line in lines[1:]] == pytest.approx(
        [0.1 + 0.2, float("nan"), 1e-30], rel=0, abs=0, nan_ok=True
    )
    (line,) = (run.folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"epoch": 1, "loss": 0.5, "rates": [1.0, None]}


def test_rows_of_other_columns_are_refused(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.add_rows([row(0, 1.0)])
    with pytest.raises(ValueError, match="add_rows: columns must be"):
        run.add_rows([row(1, 1.0), {"experiment": "test", "value": 2.0}])
    assert len(run.rows()) == 1


def test_an_existing_folder_is_never_written_to(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match=r"exists and is not empty; choose another --out$"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    with create(tmp_path / "run"):
        pass
    with pytest.raises(RunError, match="or add --resume to go on with it"):
        create(tmp_path / "run")
    with pytest.raises(RunError, match="is a file"):
        create(tmp_path / "thesis.txt")


def test_resume_drops_what_an_unfinished_unit_wrote(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    run.add_rows([row(0, 1.0)])
    run.log(trial=0)
    run.mark_done("trial 0")
    run.add_rows([row(1, 2.0)])
    run.log(trial=1)
    with (run.folder / "units.jsonl").open("a") as file:
        file.write('{"unit": "trial 1", "leng')  # killed while writing
    run.close()

    run = create(tmp_path / "run", resume=True)
    assert run.done("trial 0") and not run.done("trial 1")
    assert [r["trial"] for r in run.rows()] == ["0"]
    assert (run.folder / "metrics.jsonl").read_text() == '{"trial": 0}\n'
    run.add_rows([row(1, 2.0)])
    run.mark_done("trial 1")
    run.finish()

    run = create(tmp_path / "run", resume=True)
    assert [r["trial"] for r in run.rows()] == ["0", "1"]
    assert run.done("trial 1")
    assert len(manifest(run.folder)["resumed"]) == 2


def test_resume_before_any_unit_was_finished_starts_over(tmp_path: Path) -> None:
    create(tmp_path / "run").add_rows([row(0, 1.0)])
    run = create(tmp_path / "run", resume=True)
    assert run.rows() == []
    run.add_rows([row(0, 1.0)])
    assert len(run.rows()) == 1


def test_a_resumed_run_whose_training_diverges_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), create(tmp_path / "run"):
        raise KeyboardInterrupt
    with (
        pytest.raises(RunError, match="trial 0 diverged; lower --lr"),
        create(tmp_path / "run", resume=True),
        divergence("trial 0", "--lr"),
    ):
        raise DivergedError("not finite")
    assert manifest(tmp_path / "run")["status"] == "failed"
    assert "trial 0 diverged" in manifest(tmp_path / "run")["reason"]


@dataclasses.dataclass(frozen=True)
class NewerSettings(Settings):
    trials: int = cli.option(2, extends=True)
    methods: tuple[str, ...] = cli.option(("a",), extends=True)
    rate: float = 0.5


def test_resume_may_add_units_and_says_so(tmp_path: Path) -> None:
    with create(tmp_path / "run"):
        pass
    with create(tmp_path / "run", NewerSettings(), resume=True):  # of a newer version
        pass
    (first,) = manifest(tmp_path / "run")["extended"]
    assert first["settings"] == {}
    assert first["new_settings"] == {"trials": 2, "methods": ["a"], "rate": 0.5}
    assert {"time", "command", "git"} <= set(first)

    more = NewerSettings(trials=3, methods=("b", "a"))
    with create(tmp_path / "run", more, resume=True):
        pass
    with create(tmp_path / "run", more, resume=True):
        pass
    seen = manifest(tmp_path / "run")
    assert [entry["settings"] for entry in seen["extended"]] == [
        {},
        {"trials": {"was": 2, "now": 3}, "methods": {"was": ["a"], "now": ["b", "a"]}},
    ]
    assert seen["settings"]["trials"] == 3 and len(seen["resumed"]) == 3

    changes: list[tuple[dict[str, Any], str]] = [
        ({"trials": 2}, r"trials \(was 3, now 2, but it can only grow\)"),
        ({"methods": ("b", "c")}, r"methods \(was \['b', 'a'\], now \['b', 'c'\], but it can"),
        ({"rate": 0.1}, r"rate \(was 0.5, now 0.1\); give the same"),
    ]
    for change, message in changes:
        with pytest.raises(RunError, match=message):
            create(tmp_path / "run", dataclasses.replace(more, **change), resume=True)
    assert manifest(tmp_path / "run") == seen


def test_a_new_setting_of_a_newer_version_must_have_its_default(tmp_path: Path) -> None:
    create(tmp_path / "run").close()
    with pytest.raises(RunError, match=r"rate \(was 0.5, now 0.1\)"):
        create(tmp_path / "run", NewerSettings(rate=0.1), resume=True)


def test_resume_refuses_other_settings_by_name(tmp_path: Path) -> None:
    create(tmp_path / "run")
    with pytest.raises(
        RunError, match=r"other settings .*: lr \(was 0.1, now 0.2\); give the same"
    ):
        create(tmp_path / "run", Settings(lr=0.2), resume=True)
    create(tmp_path / "run", Settings(out=tmp_path), resume=True)  # where to write may change


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    create(tmp_path / "run").add_data("images", "aa" * 32)
    run = create(tmp_path / "run", resume=True)
    run.add_data("images", "aa" * 32)
    with pytest.raises(RunError, match="the data 'images' are not those the run began with"):
        run.add_data("images", "bb" * 32)


def test_resume_refuses_further_data_and_leaves_the_run_as_it_was(tmp_path: Path) -> None:
    with create(tmp_path / "run") as run:
        run.add_data("images", "aa" * 32)
        run.add_rows([row(0, 1.0)])
        run.mark_done("trial 0")
    before = manifest(tmp_path / "run")

    def resume() -> None:
        with create(tmp_path / "run", Settings(out=tmp_path), resume=True) as run:
            run.add_data("images", "aa" * 32)
            run.add_data("retrained model standard-0", "cc" * 32)  # comes when it is needed
            run.add_data("more images", "bb" * 32)

    with pytest.raises(RunError, match="no checksum of the data 'more images': it began without"):
        resume()
    assert manifest(tmp_path / "run") == before
    with create(tmp_path / "run", resume=True) as run:
        run.add_data("images", "aa" * 32)
        run.mark_done("trial 1")
    (entry,) = manifest(tmp_path / "run")["resumed"]
    assert {"time", "git", "machine"} == set(entry)


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run \(manifest.json is missing\)"):
        create(tmp_path / "nothing", resume=True)
    for text in ("{", "", "[]", '{"settings": 1, "data": {}}', "[" * 100_000, '{"settings": {}}'):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(RunError, match=r"manifest\.json is damaged"):
            create(tmp_path, resume=True)
    with pytest.raises(RunError, match="--resume needs --out"):
        RunFolder.create(None, Settings(), experiment="test", resume=True)
    create(tmp_path / "run")
    with pytest.raises(RunError, match="holds a run of 'test', not of 'other'"):
        RunFolder.create(tmp_path / "run", Settings(), experiment="other", resume=True)
    run = create(tmp_path / "cut")
    run.add_rows([row(0, 1.0)])
    run.mark_done("trial 0")
    run.close()
    (run.folder / "results.csv").write_text("")
    with pytest.raises(RunError, match=r"results\.csv is damaged"):
        create(tmp_path / "cut", resume=True)


def test_an_error_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create(tmp_path / "run"):
        1 / 0  # noqa: B018
    assert manifest(tmp_path / "run")["status"] == "failed"
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.txt").read_text()


TOO_LARGE = RuntimeError("CUDA out of memory. Tried to allocate 7 TiB")


def test_only_a_new_run_that_has_written_nothing_vanishes_when_memory_is_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def remove(folder: Path, **options: Any) -> None:
        with pytest.raises(RunError, match="is in use by"):
            lock.FolderLock(folder)
        removed(folder, **options)

    removed = runs.shutil.rmtree
    monkeypatch.setattr(runs.shutil, "rmtree", remove)
    with pytest.raises(RuntimeError, match="out of memory"), create(tmp_path / "new"):
        raise TOO_LARGE
    assert not (tmp_path / "new").exists()
    begun = create(tmp_path / "begun")
    begun.log(epoch=0)
    with pytest.raises(RuntimeError, match="out of memory"), begun:
        raise TOO_LARGE
    assert manifest(tmp_path / "begun")["status"] == "failed"


def test_a_resumed_run_keeps_its_checkpoints_when_memory_is_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    checkpoint = out / "checkpoints" / "x.safetensors"
    run = create(out)
    checkpoint.parent.mkdir()
    checkpoint.write_bytes(b"weights")
    with pytest.raises(SystemExit), run:
        raise KeyboardInterrupt
    with pytest.raises(RuntimeError, match="out of memory"), create(out, resume=True):
        raise TOO_LARGE
    assert checkpoint.read_bytes() == b"weights"
    assert manifest(out)["status"] == "failed" and "out of memory" in manifest(out)["reason"]
    assert "out of memory" in (out / "error.txt").read_text()
    create(out, resume=True).close()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), True),
        (TOO_LARGE, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), True),
        (RuntimeError("Storage size calculation overflowed with sizes=[9, 9]"), True),
        (RuntimeError("numel: integer multiplication overflow"), True),
        (OverflowError("Python int too large to convert to C ssize_t"), True),
        (OverflowError("cannot fit 'int' into an index-sized integer"), True),
        (OverflowError("math range error"), False),
        (RuntimeError("value cannot be converted to type int64_t without overflow"), False),
        (RuntimeError("stack overflow in worker"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_is_too_large_for_the_memory(error: Exception, told: bool) -> None:
    assert too_large(error) == told


def test_only_the_first_process_shows_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bar(*args: Any, **options: Any) -> Any:
        hidden.append(options["disable"])
        return tqdm(*args, **{**options, "disable": True})

    hidden: list[bool | None] = []
    tqdm = experiment.tqdm
    monkeypatch.setattr(experiment, "tqdm", bar)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with create(tmp_path / "run") as run:
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            experiment.each_unit(run, "cell", {"a": dict}, "--lr")
    assert hidden == [None, True]


WORKER = """
import dataclasses, sys, time
from pathlib import Path
from experiments.lib.runs import RunFolder

@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1

with RunFolder.create(Path(sys.argv[1]), Settings(), experiment="test") as run:
    run.add_rows([{"trial": 0, "value": 1.0}])
    run.mark_done("trial 0")
    print("ready", flush=True)
    while True:
        run.add_rows([{"trial": 1, "value": 2.0}] * 1000)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "status"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "interrupted"),
        (signal.SIGKILL, -9, "running"),
    ],
)
def test_a_stopped_run_is_readable_and_goes_on(
    tmp_path: Path, number: int, code: int, status: str
) -> None:
    process = start_interruptible(
        [sys.executable, "-c", WORKER, str(tmp_path / "run")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)  # into the middle of the writing
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()  # it would write for ever
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert errors.count("\n") == 1 and "--resume" in errors
    assert manifest(tmp_path / "run")["status"] == status
    lines = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert lines[:2] == ["trial,value", "0,1.0"]
    assert set(lines[2:]) == {"1,2.0"} and len(lines[2:]) % 1000 == 0  # whole calls only

    resumed = RunFolder.create(tmp_path / "run", Same(), experiment="test", resume=True)
    assert resumed.rows() == [{"trial": "0", "value": "1.0"}]


@contextlib.contextmanager
def another_run(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has a run open in ``folder``; it is past "ready" and writes no end."""
    process = start_interruptible(
        [sys.executable, "-c", WORKER, str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        os.kill(process.pid, signal.SIGSTOP)
        yield process
    finally:
        process.kill()
        process.communicate()


@dataclasses.dataclass(frozen=True)
class Same:
    """The settings of the worker."""

    lr: float = 0.1


@pytest.mark.slow
def test_one_process_at_a_time_has_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with another_run(folder) as process:
        before = {p: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(RunError) as caught:
            RunFolder.create(folder, Same(), experiment="test", resume=True)
        assert str(caught.value) == (
            f"{folder} is in use by process {process.pid} on {platform.node()}; wait until that "
            "has ended, or choose another --out"
        )
        assert {p: p.read_bytes() for p in folder.iterdir()} == before
    # The system lets go of what a killed process held.
    run = RunFolder.create(folder, Same(), experiment="test", resume=True)
    assert run.rows() == [{"trial": "0", "value": "1.0"}]


def test_a_folder_is_free_again_when_the_run_has_ended(tmp_path: Path) -> None:
    def failing() -> None:
        with create(tmp_path / "run"):
            with pytest.raises(RunError, match=f"is in use by process {os.getpid()} on "):
                create(tmp_path / "run", resume=True)
            raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        failing()
    assert manifest(tmp_path / "run")["reason"] == "ValueError: wrong"
    with create(tmp_path / "run", resume=True):
        pass
    assert "reason" not in manifest(tmp_path / "run")


def test_two_new_runs_cannot_share_a_folder(tmp_path: Path) -> None:
    held = lock.FolderLock(tmp_path)  # of one that has not written anything yet
    with pytest.raises(RunError, match="is in use by process"):
        create(tmp_path)
    held.release()
    create(tmp_path).close()  # of one that was killed then


def test_a_file_system_without_locks_costs_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    with monkeypatch.context() as patch:
        patch.setattr(lock.fcntl, "flock", none)
        create(tmp_path / "a").finish()
    with monkeypatch.context() as patch:
        patch.setattr(lock, "fcntl", None)  # Windows
        create(tmp_path / "b").finish()
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        f"note: {tmp_path / 'a'} cannot be locked (No locks available); "
        "do not start another run in it",
        f"note: {tmp_path / 'b'} cannot be locked (this system has no flock); "
        "do not start another run in it",
    ]
    assert manifest(tmp_path / "b")["status"] == "completed"


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "3",
        "{}",
        '{"unit": 1, "lengths": {"metrics.jsonl": 0, "results.csv": 0}}',
        '{"unit": "a"}',
        '{"unit": "a", "lengths": {"metrics.jsonl": 0}}',
        '{"unit": "a", "lengths": {"metrics.jsonl": 0, "results.csv": -1}}',
        '{"unit": "a", "lengths": {"metrics.jsonl": 0, "results.csv": 0, "../other": 0}}',
        '{"unit": "a", "lengths": {"metrics.jsonl": NaN, "results.csv": 0}}',
        "[" * 100_000,
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_foreign_line_among_the_units_is_named(tmp_path: Path, line: str, place: int) -> None:
    run = create(tmp_path / "run")
    for trial in (0, 1):
        run.add_rows([row(trial, 1.0)])
        run.mark_done(f"trial {trial}")
    run.close()
    units = run.folder / "units.jsonl"
    lines = units.read_text().splitlines(keepends=True)
    lines.insert(place, line + "\n")
    units.write_text("".join(lines))
    with pytest.raises(RunError) as caught:
        create(tmp_path / "run", resume=True)
    start = f"--resume: line {place + 1} of {units} is not of a run: "
    assert str(caught.value).startswith(start) and len(str(caught.value)) < len(start) + 150
    assert units.read_text() == "".join(lines)
    assert len(run.rows()) == 2


def test_a_unit_whose_line_lacks_its_end_is_done_again(tmp_path: Path) -> None:
    run = create(tmp_path / "run")
    for trial in (0, 1):
        run.add_rows([row(trial, 1.0)])
        run.mark_done(f"trial {trial}")
    run.close()
    units = run.folder / "units.jsonl"
    units.write_bytes(units.read_bytes()[:-1])
    run = create(tmp_path / "run", resume=True)
    assert run.done("trial 0") and not run.done("trial 1") and len(run.rows()) == 1
    run.add_rows([row(1, 1.0)])
    run.mark_done("trial 1")
    run.finish()
    assert create(tmp_path / "run", resume=True).done("trial 1")


FULL = """
import dataclasses, resource, sys
from pathlib import Path
from experiments.lib import cli
from experiments.lib.runs import RunFolder

@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1

@cli.main_guard
def main():
    resume = (Path(sys.argv[1]) / "manifest.json").exists()
    with RunFolder.create(
        Path(sys.argv[1]), Settings(), experiment="test", resume=resume
    ) as run:
        for trial in range(int(sys.argv[2])):
            if not run.done(f"trial {trial}"):
                run.add_rows([{"trial": trial, "value": "x" * 1000}] * 50)
                run.log(trial=trial)
                run.mark_done(f"trial {trial}")

main()
"""


def start_on(folder: Path, trials: int, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(trials)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


@pytest.mark.exhaustive
def test_a_file_that_cannot_grow_ends_the_run_in_one_line(tmp_path: Path) -> None:
    folder, limit = tmp_path / "run", 120_000
    done = start_on(
        folder, 9, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: cannot write to {folder}: File too large; make room, then go on with "
        f"--resume --out {folder}\n"
    )
    assert manifest(folder)["status"] == "failed"
    assert manifest(folder)["reason"].startswith(f"RunError: cannot write to {folder}")
    assert start_on(folder, 9).returncode == 0
    (tmp_path / "whole").mkdir()
    start_on(tmp_path / "whole" / "run", 9)
    for name in ("results.csv", "metrics.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "run" / name).read_bytes()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"cannot mount a small disk: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount a small disk: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.exhaustive
def test_a_full_disk_ends_the_run_in_one_line(small_disk: Path) -> None:
    folder = small_disk / "run"
    done = start_on(folder, 9)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        f"error: cannot write to {folder}: No space left on device; make room, then go on with "
        f"--resume --out {folder}\n"
    )
    again = start_on(folder, 2)  # what is there is whole
    assert again.returncode == 0, again.stderr
    assert manifest(folder)["status"] == "completed"
    lines = (folder / "results.csv").read_text().splitlines()
    assert len(lines) % 50 == 1 and {line.count(",") for line in lines} == {1}
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    again = start_on(folder, 9)  # not even the manifest can be replaced
    assert (again.returncode, again.stderr) == (2, done.stderr)
    assert manifest(folder)["status"] == "completed"


@pytest.mark.slow
def test_on_a_full_disk_no_new_run_is_left_half_made(small_disk: Path) -> None:
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    done = start_on(small_disk / "run", 1)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: cannot write to {small_disk / 'run'}: No space left on device; make room or "
        "choose another --out\n"
    )
    assert [p.name for p in small_disk.iterdir()] == ["filler"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("AMD EPYC", "AMD EPYC (family 26, model 2)"),
        ("AMD EPYC 9654 96-Core", "AMD EPYC 9654 96-Core"),
    ],
)
def test_a_cpu_whose_name_has_no_number_is_told_by_its_family(
    name: str, shown: str, tmp_path: Path
) -> None:
    core = f"processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: {name}\n"
    (tmp_path / "cpuinfo").write_text(f"{core}\n{core.replace(': 2', ': 9')}")
    assert cpu_name(tmp_path / "cpuinfo") == shown
