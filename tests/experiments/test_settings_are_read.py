"""Every field of every experiment's settings is read by a run: none is ignored silently.

A field that nobody reads yet fails here by itself, since the fields are walked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from experiments.lib.experiment import command

# What reads all fields alike, whether or not anything comes of it.
ALIKE = ("__post_init__", "check_values", "resolved", "shortened", "unused", "cut")
EXPERIMENTS: dict[str, tuple[str, str, list[str]]] = {
    "linear": ("experiments.synthetic.linear.run", "LINEAR", ["--vary", "d"]),
    "shallow": ("experiments.synthetic.shallow.run", "SHALLOW", ["--vary", "d"]),
    "phase": (
        "experiments.synthetic.phase.run",
        "PHASE",
        ["--tasks", "3", "--ranks", "1", "--samples", "12", "--trials", "1"],
    ),
    "theory": ("experiments.theory.run", "THEORY", ["8", "12"]),
    "vision": (
        "experiments.vision.run",
        "VISION",
        ["--data", "digits", "--shots", "4", "--seeds", "1"],
    ),
    "conflict": (
        "experiments.conflict.run",
        "CONFLICT",
        [
            *("--data", "digits", "--seeds", "1", "--flipped", "0.5", "--pairs", "all"),
            *("--inputs", "none", "low-rank"),
        ],
    ),
    "ratings": (
        "experiments.ratings.run",
        "RATINGS",
        ["--seeds", "1", "--tasks", "12", "--shots", "3"],
    ),
    "text": ("experiments.text.run", "TEXT", ["--seeds", "1"]),
    "language": (
        "experiments.language.run",
        "LANGUAGE",
        [
            *("--tasks", "2", "--candidates", "3", "--turns", "1", "--batch-size", "1"),
            *("--finetune-epochs", "1", "--seeds", "1", "--no-packed"),
        ],
    ),
    "language.start": (
        "experiments.language.start",
        "LANGUAGE_START",
        ["--dialogues", "20", "--candidates", "4", "--turns", "1", "--no-packed"],
    ),
}


def reading(base: Any) -> tuple[Any, set[str]]:
    """A subclass of the settings, and the names of the fields that were read of its objects."""
    names, read = {field.name for field in dataclasses.fields(base)}, set()

    class Reading(base):
        def __getattribute__(self, name: str) -> Any:
            if name in names and _is_use(sys._getframe(1)):
                read.add(name)
            return super().__getattribute__(name)

    return Reading, read


def _is_use(frame: FrameType) -> bool:
    while frame.f_code.co_name.startswith("<") and frame.f_back is not None:
        frame = frame.f_back  # out of comprehensions
    copied = Path(frame.f_code.co_filename).name == "dataclasses.py"
    return not copied and frame.f_code.co_name not in ALIKE


def unread(name: str, extra: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The fields that a smoke run of an experiment did not read."""
    module_name, attribute, arguments = EXPERIMENTS[name]
    module = importlib.import_module(module_name)
    experiment = getattr(module, attribute)
    settings = experiment.settings
    if extra is not None:
        settings = dataclasses.make_dataclass(
            settings.__name__, [("new", int, extra)], bases=(settings,), frozen=True
        )
    counted, read = reading(settings)
    main = command(name, dataclasses.replace(experiment, settings=counted))
    monkeypatch.setenv("METALORA_CACHE", str(folder / "cache"))
    with contextlib.suppress(SystemExit):
        main([*arguments, "--smoke", "--out", str(folder / "run")])
    return {field.name for field in dataclasses.fields(settings)} - read


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_field_is_read(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name in ("language", "text"):
        pytest.importorskip("transformers")
    # What ``smoke`` changes is filled in before; that it does so is tested where it is defined.
    module, attribute, _ = EXPERIMENTS[name]
    settings = getattr(importlib.import_module(module), attribute).settings
    without = set(getattr(settings, "without", ()))  # refused if given: see the test below
    assert unread(name, None, tmp_path, monkeypatch) <= {"smoke", *without}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("conflict", "--evaluate-every"),
        ("conflict", "--retrained"),
        ("ratings", "--evaluate-every"),
    ],
)
def test_a_setting_without_a_use_is_refused(
    name: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module_name, attribute, arguments = EXPERIMENTS[name]
    main = command(name, getattr(importlib.import_module(module_name), attribute))
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--smoke", "--out", str(tmp_path / "run"), option, "3"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        f"error: argument {option}: the {name} experiment has no use for it; leave it out\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["conflict", "ratings", "text"])
def test_tasks_are_not_spread_over_processes_if_all_are_measured_afterwards(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module_name, attribute, arguments = EXPERIMENTS[name]
    experiment = getattr(importlib.import_module(module_name), attribute)
    experiment.settings(parallel="tasks")  # in one process there is nothing to spread
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    experiment.settings(parallel="tasks", finetune=("none",))
    main = command(name, experiment)
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--smoke", "--out", str(tmp_path / "run"), "--parallel", "tasks"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: argument --parallel: must be data, got tasks; after a fine-tuning the "
        f"{name} experiment measures every task in each process\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_field_that_nobody_reads_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "new" in unread("linear", dataclasses.field(default=3), tmp_path, monkeypatch)
