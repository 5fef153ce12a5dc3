"""Experiments on several processes: torchrun, a process that is killed, and its restart."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import needs_gloo

pytestmark = [pytest.mark.slow, needs_gloo]
ROOT = Path(__file__).resolve().parents[2]
VISION = ["--data", "digits", "--smoke", "--seeds", "1", "--retrain", "lora-ml", "--device", "cpu"]


def torchrun(
    processes: int, module: str, *arguments: str, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "--max-restarts", str(restarts)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*command, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        check=False,
    )


def accuracies(folder: Path) -> dict[tuple[str, ...], float]:
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {tuple(v for k, v in row.items() if k != "value"): float(row["value"]) for row in rows}


def test_a_run_whose_process_is_killed_goes_on_and_equals_that_of_one(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = [*VISION, "--parallel", "tasks", "--finetune", "last-layer", "--shots", "4"]
    done = torchrun(1, "experiments.vision", *options, "--out", str(one))
    assert done.returncode == 0, done.stderr
    name = "tests.experiments.killed_once"
    done = torchrun(2, name, *options, "--out", str(two), restarts=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1  # only the first process prints
    manifest = json.loads((two / "manifest.json").read_text())
    assert (manifest["status"], len(manifest["resumed"])) == ("completed", 1)
    assert (manifest["settings"]["parallel"], manifest["notes"]["processes"]) == ("tasks", 2)
    assert not list((two / "checkpoints").iterdir())
    assert accuracies(two) == pytest.approx(accuracies(one), abs=3)
    (wanted,), (found,) = (list((f / "weights").iterdir()) for f in (one, two))
    theirs = load_file(wanted)
    for key, value in load_file(found).items():
        torch.testing.assert_close(value, theirs[key], rtol=0, atol=1e-4)

    again = torchrun(2, "experiments.vision", *options, "--out", str(two))
    errors = [line for line in again.stderr.splitlines() if line.startswith("error")]
    assert errors == [
        f"error: output folder {two} exists and is not empty; choose another --out or add "
        "--resume to go on with it"
    ]


def test_what_trains_in_one_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.lib.errors import RunError
    from experiments.theory.run import THEORY

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError, match="theory trains in one process; start it without torchrun"):
        THEORY.show(THEORY.settings())


def test_a_port_in_use_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    from experiments.vision.run import main

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(SystemExit) as ended:
            main(VISION)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: process 0 cannot join the others at 127.0.0.1:{port} (")
    assert told.count("\n") == 1
