from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments.lib.runs import RunFolder
from experiments.synthetic.__main__ import main
from experiments.synthetic.shallow import summary as shallow
from experiments.synthetic.shallow.settings import ShallowSettings
from experiments.synthetic.shallow.summary import METRICS
from experiments.synthetic.shallow.trials import run_trials

COLUMNS = ["experiment", "vary", "setting", "method", "trial", "metric", "value"]


def run(*arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        main(["shallow", *arguments])
    return int(caught.value.code or 0)


def smoke(vary: str, folder: Path, *more: str) -> int:
    return run("--vary", vary, "--smoke", "--out", str(folder), *more)


def results(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        assert reader.fieldnames == COLUMNS
        return list(reader)


@pytest.fixture(scope="module")
def all_sweeps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "all"
    assert smoke("all", folder) == 0
    return folder


def test_the_command_writes_a_run_folder(all_sweeps: Path) -> None:
    rows = results(all_sweeps)
    assert len(rows) == 15 * 2 * 2 * len(METRICS)
    for vary, values in (("T", "2 3 5"), ("n", "100 1000 10000"), ("k", "1 3 5"), ("d", "5 10 20")):
        assert {r["setting"] for r in rows if r["vary"] == vary} == set(values.split())
    assert {r["method"] for r in rows} == {"lora-ml", "standard"}
    assert {r["metric"] for r in rows} == set(METRICS)
    assert all(float(r["value"]) > 0 for r in rows)
    for name in ("shallow", "shallow-T", "shallow-n", "shallow-N", "shallow-k", "shallow-d"):
        assert (all_sweeps / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert (all_sweeps / f"{name}.csv").is_file()
    assert (all_sweeps / "tables.md").read_text().count("| LoRA-ML |") == 5
    manifest = json.loads((all_sweeps / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["settings"]["retrain_epochs"] == 40000


@pytest.mark.slow
def test_one_sweep_alone_and_resumed(all_sweeps: Path, tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "k"
    assert smoke("k", folder) == 0
    complete = (folder / "results.csv").read_text()
    assert results(folder) == [r for r in results(all_sweeps) if r["vary"] == "k"]
    assert smoke("k", folder) == 2
    assert "--resume" in capsys.readouterr().err
    # As if the process had been killed between the two trials of the second setting.
    units = (folder / "units.jsonl").read_text().splitlines(keepends=True)
    (folder / "units.jsonl").write_text("".join(units[:3]))
    assert smoke("k", folder, "--resume") == 0
    after = results(folder)
    assert [{**r, "value": ""} for r in after] == [{**r, "value": ""} for r in results_of(complete)]
    values, before = ([float(r["value"]) for r in rows] for rows in (after, results_of(complete)))
    assert values == pytest.approx(before, rel=1e-5)
    assert smoke("k", folder, "--resume", "--lr", "0.1") == 2
    assert "lr" in capsys.readouterr().err


def results_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def test_settings_change_what_they_say() -> None:
    base = ShallowSettings(vary="T", smoke=True).shortened()
    point = base.points()[1]

    def error(**changes: object) -> tuple[float, ...]:
        settings = ShallowSettings(**{"vary": "T", "smoke": True, **changes}).shortened()  # type: ignore[arg-type]
        found = run_trials(settings.points()[1], settings, [0])
        return tuple(float(found[m]["prediction_error"]) for m in ("lora-ml", "standard"))

    assert point.name == "T=3" and error() == error()
    others = [{"lr": 0.01}, {"weight_decay": 5.0}, {"init": "normal"}, {"noise": 1.0}, {"seed": 1}]
    others += [{"retrain_epochs": 5}, {"finetune_epochs": 5}, {"dtype": "float64"}]
    for change in others:
        assert error(**change) != error(), change


def test_two_tasks_are_finetuned_with_rank_3k() -> None:
    points = {p.name: p for p in ShallowSettings().points()}
    assert points["T=2"].finetune_rank == 3 and points["T=3"].finetune_rank == 1
    assert points["k=5"].finetune_rank == points["k=5"].rank == 5
    assert points["N=10000"].retrain_samples == 10000 and points["n=1000"].retrain_samples == 1000


def test_the_summary_is_the_median_and_the_central_six_of_ten(tmp_path: Path) -> None:
    settings = ShallowSettings(vary="k")
    point = settings.points()[0]
    with RunFolder.create(tmp_path / "run", settings, experiment="shallow") as folder:
        for trial, value in enumerate([7.0, 1, 2, 100, 4, 3, 5, 6, 0.1, 50]):
            for method, factor in (("lora-ml", 1), ("standard", 10)):
                folder.add_rows(
                    [
                        dict(
                            zip(
                                COLUMNS,
                                ["shallow", "k", 1, method, trial, metric, factor * value],
                                strict=True,
                            )
                        )
                        for metric in METRICS
                    ]
                )
        found = shallow.summarise(folder.rows())
    assert found["k=1", "lora-ml", "prediction_error"] == shallow.Summary(4.5, 2, 7)
    line = shallow.tables([point], found).splitlines()[2]
    assert line.startswith("| 1 | 4.5 (2 to 7) | 45 (20 to 70) | 10.0 | 4.5 (2 to 7) |")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vary", "x"], '"x" for --vary. Choose from: "T", "n", "N", "k", "d", "all"'),
        (["--trials", "0"], "trials must be an int >= 1, got 0"),
        (["--noise", "-1"], "noise must be a finite number >= 0, got -1.0"),
        (["--lr", "nan"], "lr must be a finite number > 0, got nan"),
        (["--retrain-epochs", "0"], "--retrain-epochs must be an int >= 1, got 0"),
        (["--init", "unifrom"], 'Did you mean "uniform"?'),
        (["--dtype", "float16"], '"float16" for --dtype. Choose from: "float32", "float64"'),
    ],
)
def test_wrong_use_is_one_line(arguments: Sequence[str], message: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_divergence_is_the_users_to_put_right(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    assert smoke("T", folder, "--lr", "1e6") == 2
    error = capsys.readouterr().err
    assert "T=2 diverged; lower --lr (lora_ml: training [0] of [" in error
    assert "diverged, not finite at step " in error
    assert error.count("\n") == 1
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
