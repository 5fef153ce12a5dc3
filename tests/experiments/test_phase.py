from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from experiments.synthetic.__main__ import main
from experiments.synthetic.phase.settings import PhaseSettings
from experiments.synthetic.phase.summary import METRICS, Cell, cells, table
from experiments.synthetic.phase.trials import recover_base, recover_test_task

COLUMNS = ["experiment", "vary", "setting", "k", "d", "trial", "metric", "value"]


def run(*arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["phase", *arguments])
    return int(caught.value.code or 0)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phase") / "run"
    assert run("--smoke", "--out", str(folder)) == 0
    return folder


def test_smoke(smoke: Path) -> None:
    rows = results(smoke)
    assert len(rows) == (3 * 3 + 3 * 3) * 2 * 3  # cells of both diagrams, trials, metrics
    assert {(r["vary"], r["setting"]) for r in rows} == {
        *(("T", value) for value in ("2", "3", "4")),
        *(("n", value) for value in ("24", "32", "48")),
    }
    assert {r["d"] for r in rows} == {"12"}
    assert (smoke / "phase.png").read_bytes()[:4] == b"\x89PNG"
    with (smoke / "phase.csv").open(newline="") as file:
        shown = list(csv.DictReader(file))
    assert len(shown) == 18
    # T = 2 does not determine A*, T = 3 does.
    success = {(r["vary"], r["setting"], r["k"]): float(r["success"]) for r in shown}
    assert [success["T", tasks, "1"] for tasks in ("2", "3")] == [0, 1]
    assert json.loads((smoke / "manifest.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_resumed_runs_end_the_same(smoke: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in smoke.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    units = (folder / "units.jsonl").read_text().splitlines(keepends=True)
    (folder / "units.jsonl").write_text("".join(units[:-2]))  # as if killed in the last but one
    assert run("--smoke", "--out", str(folder), "--resume") == 0
    assert results(folder) == results(smoke)
    assert run("--smoke", "--out", str(folder), "--resume", "--seed", "1") == 2


def test_trials_are_what_their_number_says() -> None:
    short = {"ranks": (2,), "dim": 6, "outer_steps": 50, "finetune_steps": 50}
    one, two = (PhaseSettings(trials=trials, **short) for trials in (1, 2))  # type: ignore[arg-type]
    first, both = recover_base(3, 2, one), recover_base(3, 2, two)
    assert both["relative_error"][0] == pytest.approx(float(first["relative_error"]), rel=1e-9)
    assert both["relative_error"][1] != both["relative_error"][0]
    over_samples = recover_test_task(3, (4, 12), 2, two)
    assert list(over_samples) == [4, 12]
    fewer = recover_test_task(3, (4,), 2, one)
    assert over_samples[4]["relative_error"].shape == (2,)
    assert fewer[4]["relative_error"].shape == (1,)


def test_recovery_is_where_theory_says() -> None:
    settings = PhaseSettings(dim=6, ranks=(1,), trials=4, outer_steps=3000)
    assert bool((recover_base(3, 1, settings)["relative_error"] < 1e-6).all())
    two = recover_base(2, 1, settings)
    assert bool((two["relative_error"] > 1e-2).all())
    assert bool((two["remaining_loss"] < 1e-10).all())  # finished, elsewhere
    tuned = recover_test_task(3, (4, 30), 1, settings)
    assert bool((tuned[4]["relative_error"] > 1e-2).all())
    assert bool((tuned[30]["relative_error"] < 1e-6).all())


def test_cells_and_table() -> None:
    trials = (1e-4, 1e-3, 0.5), (0.5, 1e-3, 0.5), (0.5, 1e-3, 0.001), (0.5, 1e-12, 0.5)
    rows = [
        {"vary": "T", "setting": "3", "k": "2", "metric": metric, "value": str(value)}
        for trial in trials
        for metric, value in zip(METRICS, trial, strict=True)
    ]
    found = cells("T", 1e-3, rows)
    assert found == {(3, 2): Cell(success=0.25, unfinished=0.25)}
    assert cells("n", 1e-3, rows) == {}
    assert table("T", found).split() == ["T", "=", "3", "k", "=", "2", "25†"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "3", "13"], "settings: ranks must be at most dim = 12, got 13"),
        (["--tasks", "0"], "settings: --tasks must be an int >= 1, got 0"),
        (["--samples", "5", "5"], "settings: samples must differ, got (5, 5)"),
        (["--tolerance", "0"], "tolerance must be a finite number > 0, got 0.0"),
        (["--device", "tpu"], 'Invalid value "tpu" for --device. Choose from: "cpu", "cuda"'),
        (["--rank", "3"], "Unknown option: --rank. Did you mean --ranks?"),
    ],
)
def test_wrong_use_is_one_line(arguments: Sequence[str], message: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("experiment", ["phase", "linear"])
def test_cuda_without_a_gpu_is_one_line(
    experiment: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        main([experiment, "--device", "cuda"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "device must be cpu here, got 'cuda': torch finds no GPU" in error
    assert error.count("\n") == 1


def test_divergence_is_the_users_to_put_right(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run("--smoke", "--out", str(tmp_path / "run"), "--inner-lr", "10") == 2
    error = capsys.readouterr().err
    assert "T=2 k=1 diverged; lower --outer-lr, --inner-lr or" in error and "(lora_ml:" in error


@pytest.mark.gpu
def test_a_gpu_gives_the_cpus_numbers(smoke: Path, tmp_path: Path) -> None:
    assert run("--smoke", "--device", "cuda", "--out", str(tmp_path / "run")) == 0
    for row, wanted in zip(results(tmp_path / "run"), results(smoke), strict=True):
        assert float(row["value"]) == pytest.approx(float(wanted["value"]), rel=1e-6, abs=1e-10)
