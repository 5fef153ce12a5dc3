"""Trials that ran apart make one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.language.join import join, main
from experiments.language.run import LANGUAGE
from experiments.language.settings import LanguageSettings
from experiments.language.summary import COLUMNS, METRICS
from experiments.lib.errors import RunError
from experiments.lib.runs import RunFolder
from experiments.lib.training import row
from experiments.report import results


def made(path: Path, trial: int, value: float, **given: Any) -> Path:
    settings = LanguageSettings(first_seed=trial, **{"seeds": 1, **given}).resolved("cpu")
    with RunFolder.create(path, settings, experiment="language") as run:
        labels = {"model": "tiny", "method": "lora-ml", "finetune": "lora", "trial": trial}
        run.add_data("valid.jsonl", "0" * 64)
        run.add_rows(
            [
                row(COLUMNS, {**labels, "rank": 8, "task": task, "metric": metric, "value": value})
                for task in ("3", "5")
                for metric in METRICS
            ]
        )
        run.mark_done(f"finetune lora-ml lora 8 {trial}")
    return path


@pytest.mark.slow
def test_two_trials_become_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [made(tmp_path / "a", 0, 0.2), made(tmp_path / "b", 1, 0.4)]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, runs), "--out", str(tmp_path / "joined")])
    printed = capsys.readouterr()
    assert ended.value.code in (0, None), printed.err
    (line,) = (text for text in printed.out.splitlines() if text.startswith("lora-ml"))
    assert line.split()[:6] == ["lora-ml", "lora", "8", "2", "30.00", "(10.00)"]
    assert (tmp_path / "joined" / "accuracy.png").stat().st_size > 10_000
    manifest = json.loads((tmp_path / "joined" / "manifest.json").read_text())
    assert [run["trials"] for run in manifest["notes"]["runs"]] == [[0], [1]]


@pytest.mark.slow
def test_joined_runs_can_be_committed(tmp_path: Path) -> None:
    data = {"data": tmp_path / "dialogues", "device": "cpu"}  # places that are not committed
    runs = [made(tmp_path / "a", 1, 0.2, **data), made(tmp_path / "b", 3, 0.4, seeds=2, **data)]
    joined, _ = join(runs, tmp_path / "joined")
    assert joined.settings(LanguageSettings).trials == range(1, 5)
    results.add(joined.folder, "committed", tmp_path)
    added = results.load("committed", tmp_path)
    assert added.rows() == joined.rows()
    kept = added.manifest
    assert (kept["status"], kept["finished_units"]) == ("completed", 2)
    assert kept["data"] == {"valid.jsonl": "0" * 64}
    assert (kept["settings"]["first_seed"], kept["settings"]["seeds"]) == (1, 4)
    assert [(run["folder"], run["trials"]) for run in kept["notes"]["runs"]] == [
        ("a", [1]),
        ("b", [3, 4]),
    ]
    assert all(run.keys() == {"folder", "commit", "trials"} for run in kept["notes"]["runs"])
    assert LANGUAGE.report is not None
    (line,) = LANGUAGE.report.tables(added)[""].rows
    assert "30.0 (10.0)" in line
    assert [path.name for path in LANGUAGE.report.figures(added)] == ["accuracy.png", "tasks.png"]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first, other = made(tmp_path / "a", 0, 0.2), made(tmp_path / "b", 1, 0.4, lr=1e-3)
    out = tmp_path / "joined"
    with pytest.raises(RunError, match="differ in lr; only runs that are equal"):
        join([first, other], out)
    with pytest.raises(RunError, match="differ in data_seed; only runs that are equal"):
        join([first, made(tmp_path / "e", 1, 0.4, data_seed=1)], out)
    changed = made(tmp_path / "d", 2, 0.3) / "manifest.json"
    changed.write_text(changed.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(RunError, match="differ in data; only"):
        join([first, changed.parent], out)
    changed.write_text(changed.read_text().replace("1" * 64, "0" * 64))
    changed.write_text(changed.read_text().replace('"alpha": 16.0,', ""))
    with pytest.raises(RunError, match="differ in alpha; only"):
        join([first, changed.parent], out)
    with pytest.raises(RunError, match="both have trial 0"):
        join([first, made(tmp_path / "c", 0, 0.3)], out)
    with pytest.raises(RunError, match="holds no run"):
        join([first, tmp_path], out)
    manifest = first / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"completed"', '"interrupted"'))
    with pytest.raises(RunError, match="is interrupted; finish it with --resume --out"):
        join([first], out)
    assert not out.exists()
