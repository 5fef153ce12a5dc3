from __future__ import annotations

from pathlib import Path

import pytest

from experiments import demo
from experiments.vision.settings import METHODS


def test_tables_hold_mean_and_standard_error() -> None:
    rows = [
        {"vary": "T", "setting": "3", "method": method, "value": str(value)}
        for method, values in {"lora-ml": (1, 3), "standard": (200, 600)}.items()
        for value in values
    ]
    assert demo.linear_table(rows).splitlines()[-1].split() == [
        *("T", "=", "3", "2", "(1)", "400", "(200)", "200"),
    ]
    rows = [
        {"method": m, "finetune": f, "shots": "10", "metric": metric, "value": str(value)}
        for m in METHODS
        for f in ("lora", "last-layer")
        for value in (0.8, 0.9)
        for metric, value in (("accuracy_best", value), ("accuracy_last", 0.1))
    ]
    lines = demo.vision_table(rows).splitlines()
    assert [line.split() for line in lines[2:]] == [[m, *["85.0", "(5.0)"] * 2] for m in METHODS]


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
