from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lib.errors import RunError
from experiments.lib.manifest import resumed_manifest
from experiments.lib.runs import RunFolder
from experiments.report import results
from experiments.vision.data import load_digits
from experiments.vision.rates import chosen_rates
from experiments.vision.run import VISION, main
from experiments.vision.settings import PAIRS, VisionSettings
from experiments.vision.summary import results_tables, summary, table
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
    labels = {"finetune": "last-layer", "shots": "4", "draw": 0, "trial": 0}
    trials.finetune(model, labels)
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
        "note: --download has no effect in this run: it is for cifar10, cifar10-16 only",
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
    assert capsys.readouterr().out.startswith("no model was fine-tuned")


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
            "finetune standard lora 4 0 1e+30 0 diverged; lower --finetune-lr (",
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
    assert VisionSettings(reptile="paper", epochs=100).resolved("cpu").reptile_epochs == 5
    assert VisionSettings(epochs=7, reptile_epochs=3).resolved("cpu").reptile_epochs == 3
    given = VisionSettings(smoke=True, seeds=3, lr=0.5, epochs=7).resolved("cpu")
    assert (given.seeds, given.lr, given.epochs, given.reptile_epochs) == (3, 0.5, 7, 7)


def rows_of(method: str, shots: str, rate: str, *values: float) -> list[dict[str, str]]:
    same = {"data": "cifar10", "method": method, "finetune": "lora", "shots": shots, "draw": "0"}
    return [
        {**same, "finetune_lr": rate, "trial": str(t), "metric": metric, "value": str(value)}
        for t, value in enumerate(values)
        for metric in ("accuracy_best", "accuracy_last")
    ]


def test_a_trial_counts_once_all_its_draws_are_done() -> None:
    rows = [
        *rows_of("standard", "10", "0.1", 0.5, 0.6),
        *({**row, "draw": "1"} for row in rows_of("standard", "10", "0.1", 0.7)),
        *rows_of("standard", "all", "0.1", 0.9),
    ]
    few, every = summary([{**rows[0], "finetune": "", "metric": "validation_best"}, *rows])
    assert (few["trials"], few["accuracy_last"]) == (1, pytest.approx(60))  # of 50 and 70
    assert every["accuracy_last"] == pytest.approx(90)


def test_summary_and_table() -> None:
    rows = rows_of("lora-ml", "all", "0.1", 0.8, 0.9) + rows_of("standard", "all", "0.2", 0.7)
    two, one = summary(rows)
    assert two["accuracy_best"] == pytest.approx(85)
    assert two["accuracy_best_se"] == pytest.approx(5)  # |90 - 80| / 2
    assert math.isnan(one["accuracy_best_se"])
    assert two["accuracy_last_vs"].difference == pytest.approx(10)  # of the trial that both have
    assert one["accuracy_last_vs"] is None
    text = table([two, one])
    assert "85.00 (5.00)" in text and "70.00 (n/a)" in text
    assert "+10.00 (n/a), ahead in 1 of 1" in text
    assert "86.09 (0.35)" in text  # the paper's number
    assert "86.09" not in table(summary([{**row, "shots": "10"} for row in rows]))


def test_the_tables_of_the_documentation() -> None:
    rows = [
        *rows_of("standard", "all", "0.1", 0.7, 0.7),
        *rows_of("lora-ml", "all", "0.1", 0.8, 0.7),
        *rows_of("lora-ml", "10", "0.2", 0.6, 0.6),
        *rows_of("standard", "10", "0.1", 0.5, 0.6),
    ]
    tables = results_tables(rows)
    assert tables[""].header[2:] == ["standard", "LoRA-ML", "trials"]
    assert tables[""].rows == [
        ["LoRA", "10", "55.0 (5.0)", "60.0 (0.0)<br>+5.0 [−58.5, +68.5], 1 of 2", "2"],
        ["LoRA", "all", "70.0 (0.0)", "75.0 (5.0)<br>+5.0 [−58.5, +68.5], 1 of 2", "2"],
    ]
    assert [row[-1] for row in tables["best"].rows] == ["", "", "86.09 (0.35)", "85.29 (0.17)"]
    digits = results_tables([{**row, "data": "digits"} for row in rows])
    assert "paper" not in digits["best"].header
    assert set(results_tables([r for r in rows if r["metric"] != "accuracy_best"])) == {""}
    retrained = [{**row, "finetune": "", "shots": "", "metric": "validation_last"} for row in rows]
    found = results_tables([*rows, *retrained[:1], *retrained[4:5]])["retraining"]
    wanted = [["LoRA-ML", "80.0"], ["standard", "70.0"]]
    assert [row[:2] for row in found.rows] == wanted
    short = results_tables([*rows, *retrained[:1], *retrained[4:5]])["short"]
    assert short.header[2:] == ["retraining tasks", "10 images", "all images"]
    assert short.rows == [
        ["LoRA-ML", "LoRA", "80.0", "60.0 (0.0)", "75.0 (5.0)"],
        ["standard", "LoRA", "70.0", "55.0 (5.0)", "70.0 (0.0)"],
    ]


def test_a_summary_of_several_rates_has_a_line_for_each() -> None:
    rows = [
        *rows_of("standard", "10", "0.1", 0.7, 0.7),
        *rows_of("standard", "10", "0.2", 0.6, 0.6),
        *rows_of("lora-ml", "10", "0.1", 0.6, 0.7),
    ]
    lines = summary(rows)
    assert [(line["method"], line["finetune_lr"]) for line in lines] == [
        ("standard", "0.1"),
        ("standard", "0.2"),
        ("lora-ml", "0.1"),
    ]
    assert lines[2]["accuracy_last_vs"].difference == pytest.approx(-5)


def run(out: Path, **given: Any) -> RunFolder:
    settings = {"seeds": 1, "retrain": ("lora-ml", "standard"), "shots": ("4",), **given}
    return VISION.run(vision_settings(**settings, out=out))


def accuracies(folder: RunFolder, **columns: str) -> list[str]:
    wanted = {"metric": "accuracy_last", **columns}
    return [row["value"] for row in folder.rows() if wanted.items() <= row.items()]


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.vision.figures.draw", lambda folder: [])


@pytest.mark.usefixtures("_no_figures")
def test_draws_and_seeds_may_be_added_and_change_nothing_before(tmp_path: Path) -> None:
    given: dict[str, Any] = {"retrain": ("standard",), "finetune": ("lora",), "shots": ("4", "all")}
    first = run(tmp_path / "run", **given, draws=2)
    before = first.rows()
    assert [row["draw"] for row in before if row["metric"] == "accuracy_last"] == ["0", "1", "0"]
    more = {**given, "draws": 3, "seeds": 2, "finetune": ("lora", "last-layer")}
    grown = run(tmp_path / "run", **more, resume=True)
    assert grown.rows()[: len(before)] == before
    (added,) = grown.manifest["extended"]
    assert set(added["settings"]) == {"draws", "seeds", "finetune"}
    whole = run(tmp_path / "whole", **more)
    assert sorted(map(str, grown.rows())) == sorted(map(str, whole.rows()))
    with pytest.raises(RunError, match=r"draws \(was 3, now 2, but it can only grow\)"):
        run(tmp_path / "run", **{**more, "draws": 2}, resume=True)


def test_draws_are_of_other_images_and_the_first_is_that_of_a_single_one() -> None:
    trials = vision(shots=("4",))
    drawn = [
        trials._test_task({"shots": "4", "trial": 0, **draw}).images.pixels
        for draw in ({}, {"draw": 0}, {"draw": 1}, {"draw": 2})
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2]) and not torch.equal(drawn[2], drawn[3])


@pytest.mark.usefixtures("_no_figures")
def test_accuracy_may_be_measured_after_the_last_epoch_alone(tmp_path: Path) -> None:
    given: dict[str, Any] = {"retrain": ("standard",), "finetune_epochs": 3}
    often, last = (run(tmp_path / str(n), **given, evaluate_every=n) for n in (1, 3))
    assert accuracies(often) == accuracies(last)
    assert {row["metric"] for row in last.rows()} == {
        *("accuracy_last", "validation_best", "validation_last")
    }
    epochs = [r for r in last.records() if r["phase"] == "finetune"]
    assert [r["epoch"] for r in epochs if "validation" in r] == [2, 2]
    assert "best epoch" not in table(summary(last.rows()))


def test_standard_retraining_may_take_as_many_steps_as_the_others() -> None:
    def steps(**given: Any) -> int:
        trials = vision(batch_size=10, **given)
        size = trials._batch_size("standard")
        return len(trials.loader(trials.retraining, size, seed=0, order="pooled"))

    rounds = vision(batch_size=10).loader(vision().retraining, 10, seed=0)
    assert steps() > 3 * len(rounds) and steps(equal_steps=True) == len(rounds)
    # Whole batches of 256 images: 26 of 10 are nearest to 28 steps from below.
    assert sum(rounds.rounds_per_task) == 28 and steps(equal_steps=True, step_per="task") == 26


@pytest.mark.usefixtures("_no_figures")
def test_models_retrained_in_another_run_are_taken_as_they_are(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", seeds=2)
    run(tmp_path / "retrained", finetune=("none",), seeds=1)
    given: dict[str, Any] = {"retrained": (tmp_path / "retrained",)}
    taken = run(tmp_path / "taken", **given)
    assert accuracies(taken) == accuracies(whole, trial="0")
    assert not (tmp_path / "taken" / "weights").exists()
    assert {"retrained model lora-ml-0", "retrained model standard-0"} < set(taken.manifest["data"])

    for change, message in (
        ({"seeds": 2}, "retrained has not finished 'retrain lora-ml 1'; leave lora-ml out by --"),
        ({"lr": 0.5}, "retrained lora-ml with lr .*, not 0.5; leave lora-ml out by --retrain"),
        ({"rank": 2}, "retrained lora-ml with rank 1, not 2; leave"),
    ):
        with pytest.raises(RunError, match=message):
            run(tmp_path / "other", **given, **change)
    assert not (tmp_path / "other").exists()
    rank_2 = run(tmp_path / "rank", **given, retrain=("standard",), rank=2)
    assert accuracies(rank_2, finetune="last-layer") == accuracies(
        whole, method="standard", finetune="last-layer", trial="0"
    )
    run(tmp_path / "second", finetune=("none",), first_seed=1)
    trials = (tmp_path / "retrained", tmp_path / "second")
    both = run(tmp_path / "both", retrained=trials, seeds=2)
    assert both.rows() == whole.rows()  # those of the retrainings too
    assert run(tmp_path / "both", retrained=trials, seeds=2, resume=True).rows() == both.rows()
    run(tmp_path / "lora-ml-2", retrain=("lora-ml",), finetune=("none",), rank=2)
    two_runs = (tmp_path / "retrained", tmp_path / "lora-ml-2")
    joined = run(tmp_path / "joined", retrained=two_runs, finetune=("lora",), rank=2)
    assert accuracies(joined, method="standard") == accuracies(rank_2, finetune="lora")
    assert accuracies(joined, method="lora-ml") == accuracies(
        run(tmp_path / "rank-2", retrain=("lora-ml",), finetune=("lora",), rank=2)
    )
    # What is taken stays taken, and what was retrained here is not taken from elsewhere.
    with pytest.raises(RunError, match="'retrain lora-ml 0' was taken from another run; give the"):
        run(tmp_path / "taken", resume=True, seeds=2)
    before = run(tmp_path / "own").rows()
    assert run(tmp_path / "own", **given, resume=True).rows() == before
    # The other run has gone on meanwhile, with another version: its models are not these.
    weights = tmp_path / "retrained" / "weights" / "standard-0.safetensors"
    weights.write_bytes((tmp_path / "whole" / "weights" / "standard-1.safetensors").read_bytes())
    with pytest.raises(RunError, match="the data 'retrained model standard-0' are not those"):
        run(tmp_path / "taken", **given, resume=True)


@pytest.mark.usefixtures("_no_figures")
def test_rates_are_chosen_without_the_test_task(tmp_path: Path) -> None:
    tried: dict[str, Any] = {"finetune_lrs": (1e-6, 3e-2), "finetune_epochs": 5, "shots": ("20",)}
    source = run(tmp_path / "rates", **tried, tasks=("0-1", "2-3", "4-5", "6-7"))
    given: dict[str, Any] = {"finetune_lr_from": tmp_path / "rates", "shots": ("20",)}
    chosen = run(tmp_path / "chosen", **given)
    rates = chosen.manifest["notes"]["finetune_lr"]
    assert len(rates) == 4
    for name, rate in rates.items():
        method, kind, _ = name.split()
        (row,) = (
            row
            for row in chosen.rows()
            if (row["method"], row["finetune"], row["metric"]) == (method, kind, "accuracy_last")
        )
        assert float(row["finetune_lr"]) == rate
        means = {
            lr: accuracies(source, method=method, finetune=kind, finetune_lr=lr)[0]
            for lr in ("1e-06", "0.03")
        }
        assert float(means[str(rate)]) == max(map(float, means.values()))

    run(tmp_path / "leaky", **tried)
    for change, message in (
        ({"finetune_lr_from": tmp_path / "leaky"}, "has seen the test task 8-9; rates must be"),
        ({"shots": ("30",)}, "has not fine-tuned lora-ml with lora on 30 images; resume it"),
        ({"retrain": ("reptile",)}, "has not fine-tuned reptile with lora on 20 images"),
    ):
        with pytest.raises(RunError, match=message):
            run(tmp_path / "other", **{**given, **change})
    assert not (tmp_path / "other").exists()


def test_a_run_with_few_images_draws_its_figure(tmp_path: Path) -> None:
    run(tmp_path / "run", shots=("all", "10", "4"), draws=2, evaluate_every=9)
    lines = (tmp_path / "run" / "accuracy.csv").read_text()
    assert (tmp_path / "run" / "accuracy.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "curves.png").exists()
    assert "accuracy_last_vs" in lines.partition("\n")[0]


def test_committed_rates_serve_as_those_of_a_run() -> None:
    name = "vision-16-rates"
    sha256 = results.load(name).manifest["data"]["cifar10-16"]
    given = VisionSettings(
        data="cifar10-16", shots=("10", "1000"), finetune_lr_from=results.FOLDER / name
    )
    rates = chosen_rates(given.resolved("cpu"), "vision", sha256)
    assert rates is not None and rates["lora-ml", "lora", "10"] == 0.03
    with pytest.raises(RunError, match="vision-16-rates holds committed results, not a run"):
        resumed_manifest(results.FOLDER / name, given, "vision")
