from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import demo
from experiments.conflict.trials import Trials
from experiments.synthetic.linear import figures
from experiments.synthetic.linear import run as linear


def test_the_table_holds_mean_and_standard_error() -> None:
    rows = [
        {
            "pairs": "all",
            "inputs": "views",
            "flipped": "0.5",
            "method": method,
            "batch_size": "",
            "retrain_lr": "",
            "finetune": finetune,
            "shots": shots,
            "trial": trial,
            "metric": metric,
            "value": str(value + shift),
        }
        for method in demo.METHODS
        for finetune, shift in (("lora", 0.0), ("last-layer", -0.1))
        for shots in ("4", "10")
        for trial, value in (("0", 0.8), ("1", 0.9))
        for metric in ("validation", "accuracy")
    ]
    rows += [
        {**row, "finetune": "", "shots": "", "metric": "validation_last", "value": "0.9"}
        for row in rows
        if (row["finetune"], row["shots"], row["metric"]) == ("lora", "4", "accuracy")
    ]
    lines = demo.conflict_table(rows).splitlines()
    assert [line.split() for line in lines[3:]] == [
        [method, "90.0", "(0.0)", *["85.0", "(5.0)"] * 2] for method in demo.METHODS
    ]


def test_an_existing_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(SystemExit) as ended:
        demo.main(["--out", str(tmp_path)])
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and "exists and is not empty" in printed.err
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.slow
def test_an_interrupted_demo_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "SEEDS", 1)
    monkeypatch.setattr(figures, "draw", lambda *args: [])  # drawing takes longer than the rest
    monkeypatch.setattr("experiments.conflict.figures.draw", lambda folder: [])
    out = tmp_path / "demo"

    def main(*arguments: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            demo.main(["--smoke", *arguments])
        return int(ended.value.code or 0), capsys.readouterr().err

    for module, name in ((linear, "run_point"), (Trials, "finetune")):
        with interrupted_at_the_third_call(module, name):
            code, error = main("--out", str(out), *(["--resume"] if out.exists() else []))
        assert code == 130
        assert error.endswith(f"; go on with --resume --out {out}\n")
        units = {f: (f / "units.jsonl").read_text() for f in out.iterdir()}
    assert len(units) == 2
    assert main("--resume", "--out", str(out)) == (0, "")
    for folder, before in units.items():
        assert json.loads((folder / "manifest.json").read_text())["status"] == "completed"
        assert (folder / "units.jsonl").read_text().startswith(before)
    assert len((out / "linear" / "results.csv").read_text().splitlines()) == 1 + 15 * 2 * 2

    code, error = main("--out", str(out))
    assert code == 2 and error.endswith("choose another --out or add --resume to go on with it\n")


@contextlib.contextmanager
def interrupted_at_the_third_call(owner: Any, name: str) -> Iterator[None]:
    original, calls = getattr(owner, name), []

    def counting(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counting)
        yield


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume"], "--resume needs --out, the folder of the demo to go on with"),
        (
            ["--resume", "--out", "nothing"],
            "nothing holds no demo (linear/manifest.json is missing",
        ),
    ],
)
def test_resuming_what_is_no_demo(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        demo.main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
