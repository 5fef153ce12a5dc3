from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import metalora
from experiments import cli
from experiments.runs import RunError, RunFolder
from tests.processes import start_interruptible

ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    seeds: tuple[int, ...] = (0, 1)
    out: Path | None = cli.option(None, run_only=True)


def create(out: Path, settings: Settings = Settings(), resume: bool = False) -> RunFolder:
    return RunFolder.create(out, settings, experiment="test", resume=resume, command=["test"])


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


def test_resume_of_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run \(manifest.json is missing\)"):
        create(tmp_path / "nothing", resume=True)
    (tmp_path / "manifest.json").write_text("{")
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
    (run.folder / "results.csv").write_text("")
    with pytest.raises(RunError, match=r"results\.csv is damaged"):
        create(tmp_path / "cut", resume=True)


def test_an_error_is_recorded_and_goes_on(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), create(tmp_path / "run"):
        1 / 0  # noqa: B018
    assert manifest(tmp_path / "run")["status"] == "failed"
    assert "ZeroDivisionError" in (tmp_path / "run" / "error.txt").read_text()


WORKER = """
import dataclasses, sys, time
from pathlib import Path
from experiments.runs import RunFolder

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
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()  # it would write for ever
    assert process.returncode == code
    if number != signal.SIGKILL:
        assert errors.count("\n") == 1 and "--resume" in errors
    assert manifest(tmp_path / "run")["status"] == status
    lines = (tmp_path / "run" / "results.csv").read_text().splitlines()
    assert lines[:2] == ["trial,value", "0,1.0"]
    assert set(lines[2:]) == {"1,2.0"} and len(lines[2:]) % 1000 == 0  # whole calls only

    @dataclasses.dataclass(frozen=True)
    class Same:
        lr: float = 0.1

    resumed = RunFolder.create(tmp_path / "run", Same(), experiment="test", resume=True)
    assert resumed.rows() == [{"trial": "0", "value": "1.0"}]
