from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lib.errors import RunError
from experiments.lib.machine import choose_device, one_thread
from experiments.vision import report
from experiments.vision.data import load_digits
from experiments.vision.protocol import Protocol
from experiments.vision.run import main, run
from experiments.vision.settings import METHODS, PAIRS, Settings

CPU = torch.device("cpu")


def settings(**given: Any) -> Settings:
    return Settings(data="digits", smoke=True, device="cpu", **given)


def command(*arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as ended, one_thread():
        main(arguments)
    return int(ended.value.code or 0)


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    few = ("--smoke", "--seeds", "1", "--shots", "4", "--device", "cpu")
    assert command("--data", "digits", *few, "--out", str(out)) == 0
    done = capsys.readouterr()
    assert done.err == ""  # no progress bars where there is no terminal
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        "experiment", "data", "method", "finetune", "shots", "trial", "metric", "value",
    ]  # fmt: skip
    measured = {
        (r["method"], r["finetune"], r["shots"]) for r in rows if r["metric"] == "accuracy_best"
    }
    assert measured == {(m, f, "4") for m in METHODS for f in ("lora", "last-layer")}
    assert all(0 <= float(r["value"]) <= 1 for r in rows)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert manifest["data"] == {"digits": load_digits().sha256}
    for name in ("accuracy", "curves"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.csv").read_text().count("\n") > 1
    assert all(m in done.out for m in METHODS)
    assert "(n/a)" in done.out

    assert command("--data", "digits", "--out", str(out)) == 2
    again = capsys.readouterr().err
    assert again.count("\n") == 1 and "exists and is not empty" in again


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrain", "lora_ml"], "did you mean 'lora-ml'"),
        (["--data", "cifar"], "did you mean 'cifar10'?"),
        (["--data", "cifar10"], "no CIFAR-10 in data: neither cifar-10-batches-py/ nor"),
        (["--data", "digits", "--lr", "nan"], "--lr must be a finite number > 0, got nan"),
        (["--data", "digits", "--seeds", "0"], "--seeds must be an int >= 1, got 0"),
        (["--data", "digits", "--shots", "1"], "--shots: must be numbers >= 2 or all, got '1'"),
        (["--data", "digits", "--shots", "9999"], "--shots 9999: the test task has only 10"),
        (["--data", "digits", "--tasks", "0-1", "2-12"], "two classes from 0 to 9, got '2-12'"),
        (["--data", "digits", "--device", "gpu7"], "--device gpu7 cannot be used here"),
        (["--data", "digits", "--resume"], "--resume needs --out"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_resumed_equals_one_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "figures", lambda folder: [])  # drawing takes longer than the run
    given = {"retrain": ("lora-ml", "standard"), "finetune": ("all",), "shots": ("4",)}
    run(settings(**given, out=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "results.csv").read_text()

    original, calls = Protocol.finetune, []

    def stop_in_the_third(self: Protocol, *args: Any) -> Any:
        calls.append(args)
        result = original(self, *args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(Protocol, "finetune", stop_in_the_third)
    with pytest.raises(SystemExit) as ended:
        run(settings(**given, out=tmp_path / "cut"))
    assert ended.value.code == 130
    assert json.loads((tmp_path / "cut" / "manifest.json").read_text())["status"] == "interrupted"
    part = (tmp_path / "cut" / "results.csv").read_text()
    assert whole.startswith(part) and part != whole

    with pytest.raises(RunError, match=r"other settings .*: finetune_lr \(was"):
        run(settings(**given, finetune_lr=0.5, out=tmp_path / "cut", resume=True))
    run(settings(**given, out=tmp_path / "cut", resume=True))
    assert (tmp_path / "cut" / "results.csv").read_text() == whole
    assert len(calls) == 3 + (8 - 2)  # of 2 trials x 2 methods x 2 fine-tunings, two were done

    weights = tmp_path / "cut" / "weights" / "lora-ml-0.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(RunError, match=r"lora-ml-0\.safetensors is missing or damaged"):
        run(settings(**given, out=tmp_path / "cut", resume=True))


def retrained(method: str, **given: Any) -> torch.Tensor:
    """The weights after a short retraining, as one vector."""
    protocol = Protocol(settings(**given).resolved("cpu"), load_digits(), CPU)
    model, _ = protocol.retrain(method, 0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_methods_differ_from_one_start_and_repeat() -> None:
    protocol = Protocol(settings().resolved("cpu"), load_digits(), CPU)
    start, same = protocol.new_model(0), protocol.new_model(0)
    other = protocol.new_model(1)
    assert torch.equal(start.embed.weight, same.embed.weight)
    assert not torch.equal(start.embed.weight, other.embed.weight)
    ends = [retrained(method) for method in METHODS]
    for i, end in enumerate(ends):
        assert all(not torch.equal(end, later) for later in ends[i + 1 :])
        assert torch.equal(end, retrained(METHODS[i]))


@pytest.mark.parametrize(
    ("method", "switch"),
    [
        ("standard", {"augment": "frozen"}),
        ("standard", {"augment": "none"}),
        ("standard", {"lr": 1e-4}),
        ("standard", {"weight_decay": 0.1}),
        ("standard", {"tasks": ("0-1", "8-9")}),
        ("lora-ml", {"rank": 2}),
        ("lora-ml", {"step_per": "task"}),
        ("lora-ml", {"adapter_lr": 1e-4}),
        ("lora-ml", {"adapter_weight_decay": 0.9}),
        ("lora-ml", {"adapter_steps": 2}),
        ("last-layer-ml", {"shared_head": "refit"}),
        ("standard", {"standard_order": "interleaved"}),
        ("standard", {"standard_order": "blocked"}),
        ("last-layer-ml", {"step_per": "task"}),
        ("lora-ml", {"precision": "bf16"}),
        ("reptile", {"reptile_sign": "away"}),
        ("reptile", {"reptile": "paper"}),
        ("reptile", {"reptile_inner_steps": 1}),
    ],
)
def test_each_switch_does_something(method: str, switch: dict[str, Any]) -> None:
    assert not torch.equal(retrained(method), retrained(method, **switch))


def test_a_step_per_task_is_not_for_methods_without_a_round() -> None:
    for method in ("standard", "reptile"):
        assert torch.equal(retrained(method), retrained(method, step_per="task"))


@pytest.mark.parametrize("augment", ["fresh", "frozen", "none"])
def test_frozen_images_are_the_same_in_every_epoch_and_fresh_ones_are_not(augment: str) -> None:
    protocol = Protocol(settings(augment=augment).resolved("cpu"), load_digits(), CPU)

    def images(epoch: int) -> set[bytes]:
        loader = protocol._loader(protocol.retraining, seed=1, batch_size=64)
        loader.set_epoch(epoch)
        return {image.numpy().tobytes() for batch in loader for image in batch.inputs}

    plain = protocol._held_out(protocol.retraining)
    untouched = {image.numpy().tobytes() for batch in plain for image in batch.inputs}
    assert (images(0) == images(1)) == (augment != "fresh")
    assert (images(0) == untouched) == (augment == "none")


@pytest.mark.parametrize("fine_tuned", ["fresh", "retrained"])
def test_the_last_layer_starts_where_it_is_told(fine_tuned: str) -> None:
    given = settings(finetune_head=fine_tuned, finetune_lr=1e-9, augment="none")
    protocol = Protocol(given.resolved("cpu"), load_digits(), CPU)
    model = protocol.new_model(0)
    start = model.head.weight.detach().clone()
    protocol.finetune(model, "last-layer", "4", 0)
    change = float((model.head.weight[0].detach() - start).abs().max())
    assert (change < 1e-6) == (fine_tuned == "retrained")


def test_settings_without_a_part_in_the_run_or_beyond_the_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "figures", lambda folder: [])
    given: dict[str, Any] = {"data": "digits", "smoke": True, "device": "cpu", "seeds": 1}
    given |= {"retrain": ("standard",), "finetune": ("last-layer",), "shots": ("4",), "rank": 2}
    given |= {"reptile_lr": 0.1, "download": True, "train_per_class": 99999}
    run(Settings(**given, out=tmp_path / "run"))
    assert capsys.readouterr().err.splitlines() == [
        "note: --download has no part in this run: it is for cifar10 alone",
        "note: --rank has no part in this run: it is for lora-ml, lora alone",
        "note: --reptile-lr has no part in this run: it is for reptile alone",
        "note: --train-per-class 99999: a class has at most 110, so all are used",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--retrain", "standard", "--lr", "1e30"], "retrain standard 0 diverged; lower --lr ("),
        (
            ["--retrain", "reptile", "--reptile-inner-lr", "1e30"],
            "retrain reptile 0 diverged; lower --reptile-lr or --reptile-inner-lr (",
        ),
        (
            ["--retrain", "standard", "--finetune-lr", "1e30"],
            "finetune standard lora 4 0 diverged; lower --finetune-lr (",
        ),
    ],
)
def test_divergence_is_the_users_to_put_right(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    common = ["--data", "digits", "--smoke", "--finetune", "lora", "--seeds", "1", "--shots", "4"]
    with pytest.raises(SystemExit) as ended:
        main([*common, *arguments, "--device", "cpu", "--out", str(out)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert json.loads((out / "manifest.json").read_text())["status"] == "failed"
    assert "DivergedError" in (out / "error.txt").read_text()


def test_without_bias_no_linear_layer_has_one() -> None:
    model = Protocol(settings(bias=False).resolved("cpu"), load_digits(), CPU).new_model(0)
    assert not any(
        name.endswith("bias") for name, _ in model.named_parameters() if "norm" not in name
    )


def test_retraining_never_sees_the_test_task_nor_held_out_images() -> None:
    data = load_digits()
    protocol = Protocol(Settings(data="digits").resolved("cpu"), data, CPU)
    assert len(protocol.retraining.images) == (data.train.labels < 8).sum()
    assert len(protocol.validation.images) == (data.held_out.labels < 8).sum()
    assert len(protocol.test.images) == (data.train.labels >= 8).sum()
    assert len(protocol.test_held_out.images) == (data.held_out.labels >= 8).sum()


def test_defaults_are_the_papers_on_cifar10_and_what_is_given_wins() -> None:
    paper = Settings().resolved("cuda")
    assert paper.tasks == PAIRS and paper.seeds == 5 and paper.precision == "bf16"
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (100, 256, 1e-4, 1e-5)
    assert (paper.finetune_epochs, paper.finetune_batch_size, paper.finetune_lr) == (100, 256, 5e-4)
    assert (paper.rank, paper.bias, paper.augment) == (1, True, "fresh")
    theirs = Settings(reptile="paper").resolved("cpu")
    assert (theirs.reptile_epochs, theirs.reptile_inner_steps) == (5, 20)
    assert (theirs.reptile_lr, theirs.reptile_inner_lr) == (1e-5, 1e-2)
    assert theirs.precision == "fp32"
    given = Settings(smoke=True, seeds=3, lr=0.5, epochs=7).resolved("cpu")
    assert (given.seeds, given.lr, given.epochs, given.reptile_epochs) == (3, 0.5, 7, 7)


def test_summary_and_table() -> None:
    rows = [
        {"method": m, "finetune": "lora", "shots": "all", "metric": metric, "value": str(value)}
        for m, values in {"lora-ml": (0.8, 0.9), "standard": (0.7,)}.items()
        for value in values
        for metric in ("accuracy_best", "accuracy_last", "validation_best")
    ]
    two, one = report.summary(rows)
    assert two["accuracy_best"] == pytest.approx(85)
    assert two["accuracy_best_se"] == pytest.approx(5)  # |90 - 80| / 2
    assert math.isnan(one["accuracy_best_se"])
    text = report.table([two, one])
    assert "85.00 (5.00)" in text and "70.00 (n/a)" in text


def test_a_device_that_is_not_there() -> None:
    assert choose_device("cpu") == CPU
    with pytest.raises(RunError, match="--device gpu7 cannot be used here"):
        choose_device("gpu7")
