from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments.synthetic.__main__ import main
from experiments.synthetic.linear.draws import Trial
from experiments.synthetic.linear.run import LINEAR
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.linear.summary import METRIC, table
from experiments.synthetic.linear.trials import run_point
from metalora._errors import DivergedError
from tests.processes import start_interruptible

ROOT = Path(__file__).resolve().parents[2]
COLUMNS = ["experiment", "vary", "setting", "method", "trial", "metric", "value"]


def run(*arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["linear", *arguments])
    return int(caught.value.code or 0)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


def start(*arguments: str) -> subprocess.Popen[str]:
    """Starts the command in a process of its own."""
    return start_interruptible(
        [sys.executable, "-m", "experiments.synthetic", *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )


@pytest.fixture(scope="module")
def all_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "all"
    assert run("--vary", "all", "--smoke", "--out", str(folder)) == 0
    return folder


def test_the_command_writes_a_run_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert run(*_sweep("T", folder)) == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where there is no terminal
    for expected in ("T=2", "T=3", "T=5", "results.csv", "figure1-T.png"):
        assert expected in printed.out
    rows = results(folder)
    assert len(rows) == 3 * 2 * 2
    assert {(r["experiment"], r["vary"], r["metric"]) for r in rows} == {
        ("linear", "T", "prediction_error")
    }
    assert {r["setting"] for r in rows} == {"2", "3", "5"}
    assert {r["method"] for r in rows} == {"lora-ml", "standard"}
    assert {r["trial"] for r in rows} == {"0", "1"}
    assert (folder / "figure1-T.png").read_bytes()[:4] == b"\x89PNG"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["settings"]["outer_lr"] == 0.03
    # The results are the ends of the curves that are kept.
    for row in rows:
        with np.load(folder / "curves" / f"T={row['setting']}.npz") as curves:
            errors = curves[row["method"]]
        assert errors.shape == (2, 51)
        assert errors[int(row["trial"]), -1] == float(row["value"])


def test_all_sweeps_give_the_same_numbers_as_one_alone(all_sweeps: Path, tmp_path: Path) -> None:
    rows = results(all_sweeps)
    assert [r["vary"] for r in rows if r["trial"] == "0" and r["method"] == "standard"] == [
        *("T" * 3 + "n" * 3 + "N" * 3 + "k" * 3 + "d" * 3)
    ]
    assert run("--vary", "k", "--smoke", "--out", str(tmp_path / "k")) == 0
    assert results(tmp_path / "k") == [r for r in rows if r["vary"] == "k"]
    for name in ("figure1", "figure1-T", "figure1-n", "figure1-N", "figure1-k", "figure1-d"):
        assert (all_sweeps / f"{name}.png").is_file()
        assert (all_sweeps / f"{name}.csv").is_file()


def test_the_table_holds_mean_and_standard_error() -> None:
    rows = [
        {"vary": "T", "setting": "3", "method": method, "metric": METRIC, "value": str(value)}
        for method, values in {"lora-ml": (1, 3), "standard": (200, 600)}.items()
        for value in values
    ]
    point = LinearSettings(vary="T").points()[1]
    line = table([point], rows).splitlines()[-1]
    assert line.split() == ["T=3", "2", "(1)", "400", "(200)", "200.0"]


def test_trials_and_seeds(all_sweeps: Path, tmp_path: Path) -> None:
    def values(folder: Path) -> dict[tuple[str, str, str], float]:
        return {(r["setting"], r["method"], r["trial"]): float(r["value"]) for r in results(folder)}

    assert run(*_sweep("d", tmp_path / "one"), "--trials", "1") == 0
    assert run(*_sweep("d", tmp_path / "two")) == 0
    assert run(*_sweep("d", tmp_path / "seed"), "--seed", "1") == 0
    one, two, seed = (values(tmp_path / name) for name in ("one", "two", "seed"))
    assert {key: two[key] for key in one} == pytest.approx(one, rel=1e-9)
    assert all(two[key] != seed[key] for key in two)


def test_one_truth_leaves_the_data_of_each_trial_its_own() -> None:
    point = LinearSettings(vary="T").points()[0]
    own, one = (
        [Trial(point, LinearSettings(one_truth=choice), trial) for trial in range(3)]
        for choice in (False, True)
    )
    assert not torch.equal(own[0].test_truth, own[1].test_truth)
    for trial in one:
        assert torch.equal(trial.test_truth, own[0].test_truth)
    moments = [trial.test_stats.gram for trial in one]
    assert not torch.equal(moments[0], moments[1]) and not torch.equal(moments[1], moments[2])
    for before, now in zip(own, one, strict=True):  # the inputs are those of the usual run
        assert torch.equal(before.test_stats.gram, now.test_stats.gram)


@pytest.mark.slow
@pytest.mark.parametrize("vary", ["T", "k"])
def test_layers_and_autograd_reproduce_the_native_trainers(vary: str) -> None:
    settings = LinearSettings(
        vary=vary, trials=1, outer_steps=15, inner_steps=3, finetune_steps=20, smoke=False
    )
    point = settings.points()[-1]
    native, layers = (
        run_point(point, replace(settings, engine=engine)) for engine in ("native", "layers")
    )
    for method, wanted in native.items():
        assert wanted[0, -1] != wanted[0, 0]
        torch.testing.assert_close(layers[method], wanted, rtol=1e-9, atol=0)


def test_layers_that_diverge_say_so() -> None:
    settings = LinearSettings(vary="T", trials=1, outer_steps=300, outer_lr=1e9, engine="layers")
    with pytest.raises(DivergedError, match="retraining diverged, not finite at step"):
        run_point(settings.points()[0], settings)


def test_an_existing_folder_is_refused_and_resumed(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    LINEAR.run(LinearSettings(vary="n", smoke=True, out=folder))
    complete = (folder / "results.csv").read_text()

    assert run(*_sweep("n", folder)) == 2
    message = capsys.readouterr().err
    assert str(folder) in message and "--resume" in message and message.count("\n") == 1
    assert (folder / "results.csv").read_text() == complete

    # As if the process had been killed in the last of the three settings.
    units = (folder / "units.jsonl").read_text().splitlines(keepends=True)
    (folder / "units.jsonl").write_text("".join(units[:2]))
    (folder / "curves" / "n=10000.npz").unlink()
    kept = (folder / "curves" / "n=100.npz").stat().st_mtime_ns
    assert run(*_sweep("n", folder), "--resume") == 0
    assert (folder / "results.csv").read_text() == complete
    assert (folder / "curves" / "n=100.npz").stat().st_mtime_ns == kept

    assert run(*_sweep("n", folder), "--resume", "--seed", "1") == 2
    assert "seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["linear", "--vary", "al"],
            'Choose from: "T", "n", "N", "k", "d", "all". Did you mean "all"?',
        ),
        (["linear", "--varry", "T"], "Unknown option: --varry. Did you mean --vary?"),
        (["linear", "--trials", "0"], "trials must be an int >= 1, got 0"),
        (["linear", "--trials", "few"], "must be a whole number, got 'few'"),
        (["linear", "--inner-lr", "nan"], "--inner-lr must be a finite number > 0, got nan"),
        (
            ["linaer"],
            'Unknown command "linaer". Did you mean "linear"? Available commands: linear, ',
        ),
        ([], "which experiment?"),
    ],
)
def test_wrong_use_is_one_line(arguments: Sequence[str], message: str, capsys) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_divergence_is_the_users_to_put_right(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(*_sweep("T", tmp_path / "run"), "--inner-lr", "10") == 2
    error = capsys.readouterr().err
    assert "T=2 diverged; lower --outer-lr, --inner-lr or" in error and "(lora_ml:" in error
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


@pytest.mark.slow
def test_interrupted_runs_can_be_read_and_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("linear", "--vary", "T", "--out", str(folder))
    length = ("--finetune-steps", "100", "--trials", "2", "--outer-steps", "3000")
    process = start(*arguments, *length)
    deadline = time.monotonic() + 240
    while not (folder / "units.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=240)
    status = json.loads((folder / "manifest.json").read_text())["status"]
    if process.returncode == 130:  # else it was quicker than the signal
        assert status == "interrupted" and "--resume" in error
    rows = results(folder)
    assert len(rows) % 4 == 0 and len(rows) >= 4
    assert run(*arguments[1:], *length, "--resume") == 0
    assert results(folder)[: len(rows)] == rows
    assert len(results(folder)) == 12


def _sweep(vary: str, folder: Path) -> list[str]:
    return ["--vary", vary, "--smoke", "--out", str(folder)]
