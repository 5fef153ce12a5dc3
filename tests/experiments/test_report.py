"""The pages say what the committed results say, and a run is kept whole, or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.lib.errors import RunError
from experiments.lib.runs import RunFiles
from experiments.lib.tables import compared, side_by_side
from experiments.report import __main__ as command
from experiments.report import pages, registry, results
from experiments.report.pages import Report, _commit

ROWS = """experiment,data,method,finetune,shots,draw,finetune_lr,trial,metric,value
vision,digits,lora-ml,lora,10,0,0.1,0,accuracy_last,0.9
vision,digits,lora-ml,lora,10,0,0.1,1,accuracy_last,0.8
vision,digits,standard,lora,10,0,0.1,0,accuracy_last,0.7
vision,digits,standard,lora,10,0,0.1,1,accuracy_last,0.7
"""
TABLE = "<!-- table few -->\n<!-- end -->\n"


def manifest(**changes: Any) -> dict[str, Any]:
    return {
        "experiment": "vision",
        "status": "completed",
        "started": "2026-11-29T16:21:05+00:00",
        "command": ["/home/me/python", "/home/me/experiments/vision/__main__.py", "--shots", "10"],
        "settings": {"data": "digits", "shots": ["10"], "data_root": "/home/me/data", "out": "x"},
        "data": {},
        "versions": {"python": "3.11.7", "native": {}},
        "git": {"commit": "0123456789", "changed": False},
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 1, "memory_gib": 23.6, "gpus": []},
        "wall_seconds": 600.0,
    } | changes


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    """Makes a run folder."""

    def make(rows: str = ROWS, finished: int | None = None, **changes: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir()
        (folder / "manifest.json").write_text(json.dumps(manifest(**changes)))
        (folder / "results.csv").write_text(rows)
        length = len(rows) if finished is None else finished
        lengths = {"metrics.jsonl": 0, "results.csv": length}
        (folder / "units.jsonl").write_text(json.dumps({"unit": "a", "lengths": lengths}) + "\n")
        return folder

    return make


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A clone with a front page, a page and a folder for results."""
    root = tmp_path / "clone"
    (root / "docs").mkdir(parents=True)
    (root / "experiments" / "results").mkdir(parents=True)
    (root / "README.md").write_text(f"# Title\n\n{TABLE}\nText.\n")
    (root / "docs" / "few.md").write_text(
        TABLE + "\n<!-- figure few accuracy | Accuracies -->\n<!-- end -->\n"
    )
    return root


def add(run: Path, root: Path, name: str = "few") -> Path:
    return results.add(run, name, root / "experiments" / "results")


def written(root: Path) -> list[str]:
    with Report(root) as report:
        return report.run(write=True)


def differing(root: Path) -> list[str]:
    with Report(root) as report:
        return report.run(write=False)


def test_the_pages_are_those_of_the_committed_results() -> None:
    assert differing(pages.ROOT) == []


def test_every_experiment_is_found_by_the_name_in_its_manifests() -> None:
    for name in registry.MODULES:
        assert registry.experiment(name).name == name


def test_committed_results_name_no_place_of_a_machine() -> None:
    for path in results.FOLDER.rglob("manifest.json"):
        assert not results._PATH.search(path.read_text(encoding="utf-8")), path


def test_a_run_that_has_grown_is_repeated_by_its_last_command(
    clone: Path, run: Callable[..., Path]
) -> None:
    more = [*manifest()["command"], "--seeds", "9", "--out", "runs/x", "--resume"]
    add(run(extended=[{"command": more}]), clone)
    written(clone)
    page = (clone / "docs" / "few.md").read_text()
    assert "\n    python -m experiments.vision --shots 10 --seeds 9\n" in page


def test_tables_and_figures_are_written_once(clone: Path, run: Callable[..., Path]) -> None:
    add(run(), clone)
    assert len(written(clone)) == 4  # two tables, a figure, and the place where it is shown
    page = (clone / "docs" / "few.md").read_text()
    shown = "| LoRA | 10 | 70.0 (0.0) | 85.0 (5.0)<br>+15.0 [−48.5, +78.5], 2 of 2 | 2 |"
    assert shown in page
    assert "A CPU, 1 of 2 cores, 24 GiB; 10 min; 2026-11-29; commit 0123456; [rows](../exp" in page
    assert "\n    python -m experiments.vision --shots 10\n" in page
    assert "![Accuracies](figures/few/accuracy.png)" in page
    front = (clone / "README.md").read_text()
    assert "([rows and command](experiments/results/few))" in front
    assert front.startswith("# Title\n\n<!-- table few -->\n") and front.endswith("\nText.\n")
    assert written(clone) == [] and differing(clone) == []


def test_a_changed_digit_is_found_where_it_stands(clone: Path, run: Callable[..., Path]) -> None:
    folder = add(run(), clone)
    written(clone)
    page = clone / "docs" / "few.md"
    page.write_text(page.read_text().replace("85.0", "86.0"))
    assert differing(clone) == ["docs/few.md: differs from the results: table few"]
    written(clone)
    path = folder / "results.csv"
    path.write_text(path.read_text().replace("0.9", "0.8"))
    found = differing(clone)
    assert "README.md: differs from the results: table few" in found
    assert "docs/figures/few/accuracy.png: is of other numbers than the results" in found
    assert (clone / "docs" / "few.md").read_text() == page.read_text()


def test_the_command_fails_if_a_page_differs(
    clone: Path,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pages, "ROOT", clone)
    monkeypatch.setattr(results, "FOLDER", clone / "experiments" / "results")
    folder = run()
    for argv, code in (
        (["--check"], 1),
        (["--add", str(folder), "few"], 0),
        (["--check"], 1),
        ([], 0),
        (["--check"], 0),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(argv)
        assert ended.value.code == code, argv
    told = capsys.readouterr()
    assert "README.md: differs from the results: table few" in told.out
    assert "note: no results called few yet" in told.err


def test_what_has_not_been_measured_says_so(clone: Path) -> None:
    with Report(clone) as report:
        report.run(write=True)
        assert report.missing == ["few"]
    assert (
        "*Not measured yet: no run has been committed as `few`.*"
        in (clone / "README.md").read_text()
    )


def test_an_unfinished_run_is_kept_as_far_as_its_units_are(
    clone: Path, run: Callable[..., Path]
) -> None:
    finished = len("\n".join(ROWS.split("\n")[:4])) + 1
    out = add(run(finished=finished, status="running"), clone)
    assert (out / "results.csv").read_text() == ROWS[:finished]
    written(clone)
    assert (
        "**Interim:** the run goes on; finished units of work so far: 1."
        in (clone / "README.md").read_text()
    )


def test_a_manifest_is_trimmed(clone: Path, run: Callable[..., Path]) -> None:
    kept = json.loads((add(run(), clone) / "manifest.json").read_text())
    assert kept["command"] == "python -m experiments.vision --shots 10"
    assert kept["machine"] == "A CPU, 1 of 2 cores, 24 GiB"
    assert kept["settings"] == {"data": "digits", "shots": ["10"]}


def test_where_a_run_was_resumed_is_said(clone: Path, run: Callable[..., Path]) -> None:
    here = manifest()["git"]
    states = [here, {**here, "changed": True}, {"commit": "ab" * 20, "changed": False}, None]
    out = add(run(resumed=[{"git": state} for state in states]), clone)
    text = _commit(RunFiles(out, json.loads((out / "manifest.json").read_text())))
    assert text == (
        "commit 0123456, resumed at 0123456 with changes, resumed at abababa, "
        "resumed at an unknown commit"
    )


TRIALS = {"data": "digits", "shots": ["10"], "seeds": 2, "first_seed": 0}
ONE_MORE = "".join(ROWS.splitlines(keepends=True)[0::2]).replace(",1,accuracy", ",2,accuracy")


def another_machines(seed: int, **changes: Any) -> dict[str, Any]:
    """What a run of one further trial changes in a manifest."""
    machine = manifest()["machine"] | {"cpu": "Another"}
    more = {"settings": TRIALS | {"seeds": 1, "first_seed": seed}, "wall_seconds": 60.0}
    return more | {"machine": machine, "started": "2026-12-01T00:00:00+00:00"} | changes


def test_trials_of_another_machine_are_added(clone: Path, run: Callable[..., Path]) -> None:
    folder = clone / "experiments" / "results"
    data = {"images": "0", "retrained model 0": "a"}
    made = run(settings=TRIALS, command=[*manifest()["command"], "--seeds", "2"], data=data)
    add(made, clone)
    rows = ROWS
    for seed in (2, 3):
        shutil.rmtree(made)
        lines = ONE_MORE.replace(",2,accuracy", f",{seed},accuracy")
        data = {"images": "0", f"retrained model {seed}": "b"}
        own = TRIALS | {"seeds": 1, "first_seed": seed, "of the place": True}  # kept of no run
        notes = {"processes": [4]}
        made = run(lines, **another_machines(seed, settings=own, data=data, notes=notes))
        out = results.add_trials(made, "few", folder)
        rows += lines.partition("\n")[2]
    assert (out / "results.csv").read_text() == rows
    kept = json.loads((out / "manifest.json").read_text())
    assert kept["command"] == "python -m experiments.vision --shots 10 --seeds 4"
    assert kept["settings"] == TRIALS | {"seeds": 4}
    assert kept["data"].keys() == {"images", *(f"retrained model {n}" for n in (0, 2, 3))}
    assert kept["finished_units"] == 3
    written(clone)
    page = (clone / "docs" / "few.md").read_text()
    assert "4 of 4 | 4 |" in page
    assert "24 GiB and Another, 1 of 2 cores, 24 GiB; 12 min; 2026-11-29 and 2026-12-01;" in page
    with pytest.raises(RunError, match=r"the first trial of .* is 3, but 4 follows"):
        results.add_trials(made, "few", folder)


@pytest.mark.parametrize(
    ("before", "more", "said"),
    [
        ({}, {"settings": TRIALS | {"first_seed": 2, "shots": ["30"]}}, "settings.shots"),
        ({}, {"git": {"commit": "9", "changed": False}}, "in few commit '0123456789', in "),
        ({}, {"git": {"commit": "0123456789", "changed": True}}, "run is not of one commit"),
        ({"git": {"commit": None}}, {}, "the run of few is not of one commit"),
        ({}, {"resumed": [{"git": {"commit": "9"}}]}, "run is not of one commit"),
        ({"data": {"images": "0"}}, {"data": {"images": "1"}}, "in few data.images '0', in "),
        ({}, {"data": {"images": "1"}}, "in few data.images 'absent', in "),
        ({"notes": {"decay": 1}}, {"notes": {"decay": 2}}, "in few notes.decay 1, in "),
        ({"status": "running"}, {}, "the run of few is not completed"),
        ({}, {"status": "interrupted"}, "run is not completed; finish it first"),
        ({"settings": {"data": "digits"}}, {}, "vision has no --first-seed"),
        ({}, {"rows": ONE_MORE.replace("finetune_lr", "rate")}, "has other columns than few"),
        ({}, {"rows": ROWS}, "has other trials than its settings say: 0, 1"),
        ({"rows": ONE_MORE}, {}, "few has other trials than its settings say: 2"),
        ({}, {"experiment": "text"}, "holds results of another experiment"),
    ],
)
def test_other_runs_than_further_trials_are_refused(
    clone: Path,
    run: Callable[..., Path],
    before: dict[str, Any],
    more: dict[str, Any],
    said: str,
) -> None:
    folder = clone / "experiments" / "results"
    made = run(**{"settings": TRIALS} | before)
    out = add(made, clone)
    shutil.rmtree(made)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(RunError, match=r"^[^\n]*$") as refused:
        results.add_trials(run(**{"rows": ONE_MORE} | another_machines(2, **more)), "few", folder)
    assert said in str(refused.value)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["vision/__main__.py", "--data-root", "/a/b", "--seeds", "3"], "vision --data-root DIR"),
        (["vision/__main__.py", "--data-root=/a/b"], "vision --data-root=DIR"),
        (["vision/__main__.py", "--out", "x", "--resume", "--lr", "1e-3"], "vision --lr 1e-3"),
        (["text/manpages.py", "../a"], "text.manpages DIR"),
        (["synthetic/__main__.py", "linear"], "synthetic linear"),
    ],
)
def test_commands_are_shown_as_one_types_them(argv: list[str], shown: str) -> None:
    program, *rest = argv
    found = results.command(["python", f"/home/me/experiments/{program}", *rest])
    assert found.startswith(f"python -m experiments.{shown}")
    assert "/" not in found and "--out" not in found


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"experiment": "visions"}, "no experiment is called 'visions'; there are "),
        ({"status": "failed", "reason": "ValueError: no"}, "failed: ValueError: no"),
        ({"settings": {"smoke": True}}, "is a smoke run, whose numbers say nothing"),
        ({"notes": {"from": "/home/me/start"}}, "'notes' names a place on this machine"),
        ({"rows": ""}, "has no finished unit yet"),
        ({"rows": ROWS + "vision,digits\n"}, "line 6 of "),
    ],
)
def test_what_cannot_be_kept_is_refused_and_leaves_nothing(
    clone: Path, run: Callable[..., Path], changes: dict[str, Any], said: str
) -> None:
    folder = run(**changes)
    with pytest.raises(RunError, match=r"^[^\n]*$") as refused:
        add(folder, clone)
    assert said in str(refused.value)
    assert list((clone / "experiments" / "results").iterdir()) == []


def test_names_and_folders_are_checked(clone: Path, run: Callable[..., Path]) -> None:
    folder = run()
    with pytest.raises(RunError, match=r"small letters, digits and hyphens, got '\.\./x'"):
        add(folder, clone, "../x")
    with pytest.raises(RunError, match=r"holds no run \(manifest.json is missing"):
        add(clone, clone)
    out = add(folder, clone)
    (out / "manifest.json").write_text(json.dumps(manifest(experiment="linear")))
    with pytest.raises(RunError, match="holds results of another experiment"):
        add(folder, clone)


@pytest.mark.parametrize(
    ("marker", "said"),
    [
        ("<!-- table few last -->\n<!-- end -->", "there is no table 'last'"),
        ("<!-- table few a b -->\n<!-- end -->", r"a table is NAME \[TABLE\], got 'few a b'"),
        ("<!-- figure few accuracy -->\n<!-- end -->", r"a figure is NAME FIGURE \| what it"),
        ("<!-- figure few curve | A -->\n<!-- end -->", "there is no figure 'curve'"),
        ("<!-- table few -->\n", "a marker has no <!-- end -->"),
        ("<!-- table benchmarks no -->\n<!-- end -->", "there is no table 'no'"),
        ("<!-- figure benchmarks no | A -->\n<!-- end -->", "there is no figure 'no'"),
    ],
)
def test_markers_are_checked(clone: Path, run: Callable[..., Path], marker: str, said: str) -> None:
    add(run(), clone)
    (clone / "docs" / "few.md").write_text(marker + "\n")
    with pytest.raises(RunError, match=said):
        written(clone)


def test_damaged_results_are_named(clone: Path, run: Callable[..., Path]) -> None:
    out = add(run(), clone)
    (out / "results.csv").unlink()
    with pytest.raises(RunError, match=r"holds no results\.csv"):
        written(clone)
    shutil.rmtree(out)
    out.mkdir()
    with pytest.raises(RunError, match="holds no run"):
        written(clone)


ERRORS = [
    {"method": m, "shots": s, "trial": t, "metric": "rmse", "value": v}
    for m, s, t, v in (
        ("lora-ml", "5", "0", "0.9"),
        ("standard", "5", "0", "1.0"),
        ("standard", "10", "0", "0.8"),
        ("standard", "10", "1", "0.8"),
        ("lora-ml", "10", "0", "0.9"),
        ("lora-ml", "10", "1", "0.6"),
        ("reptile", "10", "0", "0.7"),
        ("reptile", "20", "0", "0.5"),
    )
]


def test_a_method_is_compared_with_standard_retraining_of_the_same_setting() -> None:
    key = {"shots": "shots", "method": "retraining"}
    options = {"title": "RMSE", "scale": 1.0, "digits": 2, "lower_is_better": True}
    table = compared(ERRORS, key, "rmse", "", **options)
    assert table.header[2] == "RMSE"
    assert [row[:2] + row[3:] for row in table.rows if row[1] != "standard"] == [
        ["5", "LoRA-ML", "−0.10", "1 of 1", "1"],
        ["10", "LoRA-ML", "−0.05 [−1.96, +1.86]", "1 of 2", "2"],
        ["10", "Reptile", "−0.10", "1 of 1", "1"],
        ["20", "Reptile", "", "", "1"],
    ]


def test_retrainings_stand_side_by_side_with_standard_first() -> None:
    options = {"scale": 1.0, "digits": 2, "lower_is_better": True}
    table = side_by_side(ERRORS, {"shots": "shots"}, "rmse", "RMSE.", **options)
    assert table.header == ["shots", "standard", "LoRA-ML", "Reptile", "trials"]
    assert table.rows == [
        ["5", "1.00 (n/a)", "0.90 (n/a)<br>−0.10, 1 of 1", "", "1"],
        [
            *("10", "0.80 (0.00)", "0.75 (0.15)<br>−0.05 [−1.96, +1.86], 1 of 2"),
            *("0.70 (n/a)<br>−0.10, 1 of 1", "1 to 2"),
        ],
        ["20", "", "", "0.50 (n/a)", "1"],
    ]
    assert table.caption.startswith("RMSE. Below a mean: ")


@pytest.mark.parametrize(
    ("rows", "settings", "equal", "wanted"),
    [
        (ROWS, {}, True, ["accuracy_last: 4 of 4 rows have the same digits"]),
        (
            "".join(ROWS.splitlines(keepends=True)[:3]),
            {"shots": ["10"], "epochs": 3},  # a new setting's default is no difference
            True,
            [
                "accuracy_last: 2 of 2 rows have the same digits",
                "2 of the 4 rows of few are not in the run",
            ],
        ),
        (
            ROWS.replace("0.8", "0.85").replace("lora,10,0,0.1,0,", "lora,30,0,0.1,0,"),
            {"shots": ["10", "30"]},
            False,
            [
                'setting shots: ["10", "30"] in the run, ["10"] in few',
                "accuracy_last: 1 of 2 rows have the same digits, the largest difference is 0.05; "
                "2 are not in few",
                "2 of the 4 rows of few are not in the run",
            ],
        ),
    ],
    ids=["equal", "part", "other"],
)
def test_a_run_is_held_to_the_results_that_it_repeats(
    rows: str,
    settings: dict[str, Any],
    equal: bool,
    wanted: list[str],
    clone: Path,
    run: Callable[..., Path],
) -> None:
    made = run()
    add(made, clone)
    shutil.rmtree(made)
    changed = manifest()["settings"] | settings
    found = results.compare(run(rows, settings=changed), "few", clone / "experiments" / "results")
    assert found == (wanted, equal)


def test_other_data_are_named(clone: Path, run: Callable[..., Path]) -> None:
    made = run(data={"images": "0"})
    add(made, clone)
    shutil.rmtree(made)
    made = run(data={"images": "1"})
    lines, _ = results.compare(made, "few", clone / "experiments" / "results")
    assert lines[0] == "other data.images '0', in the run '1'"


def test_runs_that_cannot_be_compared_are_refused(clone: Path, run: Callable[..., Path]) -> None:
    made = run()
    add(made, clone)
    folder = clone / "experiments" / "results"
    shutil.rmtree(made)
    with pytest.raises(RunError, match="is a run of text, few of vision"):
        results.compare(run(experiment="text"), "few", folder)
    shutil.rmtree(made)
    for rows in (ROWS.replace("digits", "cifar10"), "statement,measured\n1,2\n"):
        with pytest.raises(RunError, match="few have no row in common"):
            results.compare(run(rows), "few", folder)
        shutil.rmtree(made)


def test_the_command_fails_if_numbers_differ(
    clone: Path,
    run: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(results, "FOLDER", clone / "experiments" / "results")
    made = run()
    add(made, clone)
    for digit, code in (("0.9", 0), ("0.91", 1)):
        (made / "results.csv").write_text(ROWS.replace("0.9", digit))
        with pytest.raises(SystemExit) as ended:
            command.main(["--compare", str(made), "few"])
        assert ended.value.code == code
    assert "4 of 4 rows" in capsys.readouterr().out
