from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.vision.data import load_digits
from experiments.vision.run import VISION, main
from experiments.vision.settings import PAIRS, VisionSettings
from experiments.vision.summary import summary, table
from experiments.vision.trials import Trials
from tests.experiments.retraining import CPU, vision, vision_settings


def retrained(method: str, **given: Any) -> torch.Tensor:
    """The weights after a short retraining, as one vector."""
    model, _ = vision(**given).retrain(method, 0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_step_per_task_is_not_for_methods_without_a_round() -> None:
    for method in ("standard", "reptile"):
        assert torch.equal(retrained(method), retrained(method, step_per="task"))


@pytest.mark.parametrize("augment", ["fresh", "frozen", "none"])
def test_frozen_images_are_the_same_in_every_epoch_and_fresh_ones_are_not(augment: str) -> None:
    trials = vision(augment=augment)

    def images(epoch: int) -> set[bytes]:
        loader = trials.loader(trials.retraining, 64, seed=1)
        loader.set_epoch(epoch)
        return {image.numpy().tobytes() for batch in loader for image in batch.inputs}

    plain = trials.held_out(trials.retraining)
    untouched = {image.numpy().tobytes() for batch in plain for image in batch.inputs}
    assert (images(0) == images(1)) == (augment != "fresh")
    assert (images(0) == untouched) == (augment == "none")


@pytest.mark.parametrize("fine_tuned", ["fresh", "retrained"])
def test_the_last_layer_starts_where_it_is_told(fine_tuned: str) -> None:
    trials = vision(finetune_head=fine_tuned, finetune_lr=1e-9, augment="none")
    model = trials.new_model(0)
    start = model.head.weight.detach().clone()
    trials.finetune(model, {"finetune": "last-layer", "shots": "4", "trial": 0})
    change = float((model.head.weight[0].detach() - start).abs().max())
    assert (change < 1e-6) == (fine_tuned == "retrained")


def test_settings_without_a_part_in_the_run_or_beyond_the_data_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.vision.figures.draw", lambda folder: [])
    given: dict[str, Any] = {"retrain": ("standard",), "finetune": ("last-layer",), "rank": 2}
    given |= {"seeds": 1, "shots": ("4",)}
    given |= {"reptile_lr": 0.1, "download": True, "train_per_class": 99999}
    VISION.run(vision_settings(**given, out=tmp_path / "run"))
    assert capsys.readouterr().err.splitlines() == [
        "note: --download has no effect in this run: it is for cifar10 only",
        "note: --rank has no effect in this run: it is for lora-ml, lora only",
        "note: --reptile-lr has no effect in this run: it is for reptile only",
        "note: --train-per-class 99999: a class has at most 110, so all are used",
    ]


def test_a_run_may_only_retrain(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    arguments = ["--data", "digits", "--smoke", "--retrain", "standard", "--finetune", "none"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--seeds", "1", "--device", "cpu", "--out", str(out)])
    assert ended.value.code == 0
    assert [path.name for path in (out / "weights").iterdir()] == ["standard-0.safetensors"]
    assert "retraining" in capsys.readouterr().out


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
    model = vision(bias=False).new_model(0)
    assert not any(
        name.endswith("bias") for name, _ in model.named_parameters() if "norm" not in name
    )


def test_retraining_never_sees_the_test_task_nor_held_out_images() -> None:
    data = load_digits()
    trials = Trials(VisionSettings(data="digits").resolved("cpu"), data, CPU)
    assert len(trials.retraining.images) == (data.train.labels < 8).sum()
    assert len(trials.validation.images) == (data.held_out.labels < 8).sum()
    assert len(trials.test.images) == (data.train.labels >= 8).sum()
    assert len(trials.test_held_out.images) == (data.held_out.labels >= 8).sum()


def test_defaults_are_the_papers_on_cifar10_and_what_is_given_wins() -> None:
    paper = VisionSettings().resolved("cuda")
    assert paper.tasks == PAIRS and paper.seeds == 5 and paper.precision == "bf16"
    assert (paper.epochs, paper.batch_size, paper.lr, paper.weight_decay) == (100, 256, 1e-4, 1e-5)
    assert (paper.finetune_epochs, paper.finetune_batch_size, paper.finetune_lr) == (100, 256, 5e-4)
    assert (paper.rank, paper.bias, paper.augment) == (1, True, "fresh")
    theirs = VisionSettings(reptile="paper").resolved("cpu")
    assert (theirs.reptile_epochs, theirs.reptile_inner_steps) == (5, 20)
    assert (theirs.reptile_lr, theirs.reptile_inner_lr) == (1e-5, 1e-2)
    assert theirs.precision == "fp32"
    given = VisionSettings(smoke=True, seeds=3, lr=0.5, epochs=7).resolved("cpu")
    assert (given.seeds, given.lr, given.epochs, given.reptile_epochs) == (3, 0.5, 7, 7)


def test_summary_and_table() -> None:
    rows = [
        {"method": m, "finetune": "lora", "shots": "all", "trial": str(trial)}
        | {"metric": metric, "value": str(value)}
        for m, values in {"lora-ml": (0.8, 0.9), "standard": (0.7,)}.items()
        for trial, value in enumerate(values)
        for metric in ("accuracy_best", "accuracy_last", "validation_best")
    ]
    two, one = summary(rows)
    assert two["accuracy_best"] == pytest.approx(85)
    assert two["accuracy_best_se"] == pytest.approx(5)  # |90 - 80| / 2
    assert math.isnan(one["accuracy_best_se"])
    text = table([two, one])
    assert "85.00 (5.00)" in text and "70.00 (n/a)" in text
