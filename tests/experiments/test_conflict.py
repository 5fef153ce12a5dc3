from __future__ import annotations

import csv
import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import metalora
from experiments.conflict import changes
from experiments.conflict.data import Tasks, groups
from experiments.conflict.run import CONFLICT, main
from experiments.conflict.settings import METHODS, MODELS, ConflictSettings
from experiments.conflict.summary import (
    ACCURACY,
    RATE,
    VALIDATION,
    best_finetuning,
    results_tables,
    table,
)
from experiments.conflict.trials import Trials
from experiments.lib.errors import RunError
from experiments.vision.data import Dataset, Images, load_digits
from experiments.vision.mixer import Mixer, MixerConfig, patchify, unpatchify

CPU = torch.device("cpu")
GROUPS = groups("all")
COUNT = sum(len(pairs) for pairs in GROUPS.values())


def settings(**given: Any) -> ConflictSettings:
    return ConflictSettings(data="digits", smoke=True, device="cpu", **given)


def trials(inputs: str = "views", flipped: float = 0.5, **given: Any) -> Trials:
    data = given.pop("dataset", None) or load_digits()
    return Trials(settings(**given).resolved("cpu"), data, ("all", inputs, flipped), 0, CPU)


def tasks(flipped: torch.Tensor | None = None, seed: int = 0, **sizes: int) -> Tasks:
    flipped = torch.zeros(COUNT, dtype=torch.bool) if flipped is None else flipped
    given = {"train_per_class": 10, "held_out_per_class": 20, **sizes}
    return Tasks(load_digits(), GROUPS, flipped, seed, **given)


def pictures(count: int = 6) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(5))


def drawn(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_views_are_turned_reordered_and_inverted() -> None:
    images, ids = pictures(12), torch.arange(12)
    change, again = changes.views(12, 3, 8, drawn()), drawn()
    wanted = []
    for image in images:
        turns = int(torch.randint(4, (), generator=again))
        order = torch.randperm(3, generator=again)
        inverted = bool(torch.randint(2, (), generator=again))
        turned = torch.stack([torch.rot90(image[channel], turns) for channel in order])
        wanted.append(-turned if inverted else turned)
    assert torch.equal(change(images, ids), torch.stack(wanted))
    kinds = {(int(s), tuple(p.tolist())) for s, p in zip(change.sign, change.source, strict=True)}
    assert len(kinds) > 6


def test_patches_come_in_another_order() -> None:
    images, ids = pictures(), torch.tensor([0, 0, 1, 1, 2, 2])
    found = patchify(changes.shuffled_patches(3, 3, 8, 4, drawn())(images, ids), 4)
    before, again = patchify(images, 4), drawn()
    for task in range(3):
        order = torch.randperm(4, generator=again)
        rows = ids == task
        assert torch.equal(found[rows], before[rows][:, order])


def test_the_low_rank_map_is_that_of_the_linear_model() -> None:
    images, ids = pictures().double(), torch.tensor([0, 1, 2, 2, 1, 0])
    change = changes.low_rank(3, 48, 2, 4, 5.0, drawn())
    for U in change.directions:
        torch.testing.assert_close(U.T @ U, torch.eye(2))
    change = dataclasses.replace(change, directions=change.directions.double())
    for image, after, task in zip(images, change(images, ids), ids, strict=True):
        U = change.directions[task].double()
        matrix = torch.eye(48, dtype=torch.float64) + 5.0 * U @ U.T
        for row, column in itertools.product((0, 4), (0, 4)):
            patch, found = (
                part[:, row : row + 4, column : column + 4].flatten() for part in (image, after)
            )
            torch.testing.assert_close(found, matrix @ patch)


def test_patches_are_put_together_again() -> None:
    images = pictures()
    assert torch.equal(unpatchify(patchify(images, 2), 3), images)


def test_adapters_on_the_first_layer_undo_the_low_rank_map_exactly() -> None:
    """W (I - s / (1 + s) U Uᵀ) is W plus a matrix of rank k; no last layer can do the same."""
    T, k, s = 4, 2, 5.0
    torch.manual_seed(0)
    config = MixerConfig(image_size=8, patch_size=4, width=32, token_hidden=8, channel_hidden=8)
    model = Mixer(config).double().eval()
    images, ids = pictures(64).double(), torch.arange(64) % T
    change = changes.low_rank(T, 48, k, 4, s, drawn())
    directions = torch.linalg.qr(change.directions.double()).Q
    change = dataclasses.replace(change, directions=directions)
    changed = change(images, ids)
    wanted, features = model(images), model.features(images)

    seen = torch.cat([model.features(changed), torch.ones(64, 1)], 1)
    rest = features - seen @ torch.linalg.lstsq(seen, features).solution
    assert rest.norm() > 0.1 * (features - features.mean(0)).norm()

    metalora.adapt(model, metalora.LoRAConfig(rank=k, target_modules=["embed"]), T)
    with torch.no_grad():
        model.embed.lora_A.copy_(directions.transpose(1, 2))
        model.embed.lora_B.copy_(-s / (1 + s) * model.embed.weight @ directions)
    with metalora.tasks(ids):
        torch.testing.assert_close(model(changed), wanted, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(model(images), wanted, rtol=1e-3)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_share_of_flipped_tasks_is_that_of_every_group(share: float) -> None:
    sizes = [len(pairs) for pairs in GROUPS.values()]
    flipped = changes.flipped_tasks(sizes, share, drawn())
    for part, size in zip(flipped.split(sizes), sizes, strict=True):
        assert int(part.sum()) == round(share * size)


def test_flipped_tasks_have_their_labels_exchanged_everywhere() -> None:
    plain, flipped = tasks(), tasks(torch.ones(COUNT, dtype=torch.bool))
    for group in GROUPS:
        assert torch.equal(plain.held_out(group).labels, 1 - flipped.held_out(group).labels)
    assert torch.equal(plain.retraining().labels, 1 - flipped.retraining().labels)
    assert torch.equal(plain.few("test", 4, 2).labels, 1 - flipped.few("test", 4, 2).labels)


def test_tasks_are_the_pairs_and_their_images_show_these_classes() -> None:
    data = load_digits()
    kinds = {image.numpy().tobytes(): int(label) for image, label in _each(data.train)}
    part = tasks().retraining()
    for image, label, task in zip(part.inputs, part.labels, part.tasks, strict=True):
        assert kinds[image.numpy().tobytes()] == GROUPS["retraining"][task][label]
    assert GROUPS["test"] == tuple((c, 9) for c in range(8))
    assert [len(pairs) for pairs in GROUPS.values()] == [28, 8, 8]
    assert part.tasks.unique().tolist() == list(range(28))
    assert tasks().few("test", 2, 1).tasks.unique().tolist() == list(range(36, 44))


def test_consistent_pairs_give_every_class_one_label() -> None:
    pairs = groups("consistent")
    assert [len(of) for of in pairs.values()] == [16, 8, 8]
    label = {kind: place for of in pairs["retraining"] for place, kind in enumerate(of)}
    for of in pairs.values():
        for pair in of:
            assert [label.get(kind, place) for place, kind in enumerate(pair)] == [0, 1]
    part = Tasks(load_digits(), pairs, torch.zeros(32, dtype=torch.bool), 0, 18, 20).retraining()
    assert len(_images(part.inputs)) == len(part.inputs) == 16 * 2 * 18


def _each(images: Images) -> Any:
    return zip(images.pixels, images.labels, strict=True)


def test_no_image_serves_two_purposes() -> None:
    made = tasks(train_per_class=1000, held_out_per_class=1000)
    sets = {
        "retraining": _images(made.retraining().inputs),
        "validation": _images(made.few("validation", 20, 3).inputs),
        "test": _images(made.few("test", 20, 3).inputs),
        "chosen by": _images(made.held_out("retraining").inputs)
        | _images(made.held_out("validation").inputs),
        "reported": _images(made.held_out("test").inputs),
    }
    for (one, first), (other, second) in itertools.combinations(sets.items(), 2):
        assert not first & second, (one, other)


def _images(pixels: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in pixels}


def test_a_class_deals_its_images_to_its_tasks_before_any_is_used_twice() -> None:
    part = tasks(train_per_class=9).retraining()
    assert len(_images(part.inputs)) == len(part.inputs) == 28 * 2 * 9
    everything = tasks(train_per_class=1000).retraining()
    assert len(_images(everything.inputs)) < len(everything.inputs)


def test_a_smaller_draw_is_part_of_a_larger_one_and_draws_differ() -> None:
    made = tasks()
    small, large = made.few("test", 4, 2), made.few("test", 10, 2)
    for task in range(16):
        assert _images(small.inputs[small.ids == task]) <= _images(large.inputs[large.ids == task])
    assert small.tasks.tolist() == (36 + small.ids % 8).tolist()
    assert _images(large.inputs[large.ids == 0]) != _images(large.inputs[large.ids == 8])


def test_fine_tuning_rates_are_chosen_without_the_test_tasks() -> None:
    """Other images of the test class change what is reported, and nothing that is chosen."""

    def measured(kind: str, spoilt: int | None) -> dict[str, float]:
        made = trials(dataset=_spoilt(spoilt), finetune_epochs=4)
        model = made.new_model(0)
        labels = {"method": "standard", "finetune": kind, "shots": 4, "trial": 0}
        return {row["metric"]: row["value"] for row in made.finetune(model, labels)}

    for kind in ("lora", "last-layer"):
        before, test, validation = (measured(kind, spoilt) for spoilt in (None, 9, 8))
        assert before.keys() == {VALIDATION, RATE, ACCURACY}
        assert before[VALIDATION] == test[VALIDATION] and before[RATE] == test[RATE]
        assert before[ACCURACY] != test[ACCURACY]
        assert before[VALIDATION] != validation[VALIDATION]


def _spoilt(kind: int | None) -> Dataset:
    """The digits with those of one class replaced by noise; channel statistics stay the same."""
    data = load_digits()
    if kind is None:
        return data

    def noise(images: Images) -> Images:
        pixels, rows = images.pixels.clone(), images.labels == kind
        of_class = pixels[rows].flatten()
        order = torch.randperm(len(of_class), generator=drawn())
        pixels[rows] = of_class[order].view(pixels[rows].shape)
        return Images(pixels, images.labels)

    return dataclasses.replace(data, train=noise(data.train), held_out=noise(data.held_out))


def test_the_rate_taken_is_the_best_on_validation_tasks() -> None:
    made = trials(finetune_epochs=4, last_layer_rates=(1e-9, 3e-2), tune=True)
    labels = {"method": "standard", "finetune": "last-layer", "shots": 30, "trial": 0}
    rows = {row["metric"]: row["value"] for row in made.finetune(made.new_model(0), labels)}
    assert rows[RATE] == 3e-2 and ACCURACY not in rows


def test_tuning_tries_every_rate_with_every_batch_on_validation_tasks_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, Any] = {**SMALL, "retrain": ("lora-ml",), "flipped": (0.5,), "tune": True}
    given |= {"lr": (1e-3, 1e-2), "batch_size": (8, 24), "out": tmp_path / "run"}
    rows = list(CONFLICT.run(settings(**given)).rows())
    tried = {(row["batch_size"], row["retrain_lr"]) for row in rows}
    assert tried == set(itertools.product(("8", "24"), ("0.001", "0.01")))
    assert not any(row["metric"] == ACCURACY for row in rows)
    found = results_tables(rows)[""]
    assert found.header == ["batch", "learning rate", "LoRA-ML", "trials"]
    assert len(found.rows) == 4


def test_methods_differ_in_heads_and_batches() -> None:
    def of(method: str, **given: Any) -> torch.Tensor:
        model, _ = trials(train_per_class=30, epochs=1, lr=(1e-2,), **given).retrain(method, 0)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    found = {method: of(method) for method in METHODS}
    for one, other in itertools.combinations(METHODS, 2):
        assert not torch.equal(found[one], found[other]), (one, other)
    whole = of("standard", batch_size=(28 * 24,))
    torch.testing.assert_close(whole, found["standard-equal-steps"])


SMALL: dict[str, Any] = {
    "retrain": ("lora-ml", "standard"),
    "pairs": ("all",),
    "inputs": ("views",),
    "flipped": (0.5, 0.0),
    "seeds": 1,
}


def test_a_resumed_run_ends_in_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.conflict.figures.draw", lambda run: [])
    CONFLICT.run(settings(**SMALL, out=tmp_path / "whole"))
    original, calls = Trials.finetune, []

    def interrupted(self: Trials, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Trials, "finetune", interrupted)
    with pytest.raises(SystemExit):
        CONFLICT.run(settings(**SMALL, out=tmp_path / "run"))
    CONFLICT.run(settings(**SMALL, out=tmp_path / "run", resume=True))
    results = [(tmp_path / name / "results.csv").read_text() for name in ("whole", "run")]
    assert results[0] == results[1]
    assert len(calls) == 8 + 1

    more = {**SMALL, "retrain": ("lora-ml", "standard", "reptile")}
    mixed_up = {**more, "lr": (3e-3, 1e-2, 0.5)}
    with pytest.raises(RunError, match=r"the lr of lora-ml was 0\.01 when this run began"):
        CONFLICT.run(settings(**mixed_up, out=tmp_path / "run", resume=True))
    CONFLICT.run(settings(**more, out=tmp_path / "run", resume=True))
    with (tmp_path / "run" / "results.csv").open(newline="") as file:
        assert {row["method"] for row in csv.DictReader(file)} == set(more["retrain"])


@pytest.mark.slow
def test_the_command_prints_tables_and_draws_the_dial(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--data",
        "digits",
        "--smoke",
        "--flipped",
        "0",
        "0.5",
        "--inputs",
        "views",
        "none",
    ]
    with pytest.raises(SystemExit) as ended:
        main([*arguments, "--retrain", "lora-ml", "standard", "--out", str(tmp_path / "run")])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "test tasks" in printed and "trials ahead" in printed
    for name in ("dial", "inputs", "shots"):
        assert (tmp_path / "run" / f"{name}.png").stat().st_size > 10_000


def row(metric: str, value: float, finetune: str, trial: int = 0, **other: str) -> dict[str, str]:
    same = {"pairs": "all", "inputs": "views", "flipped": "0.5", "method": "lora-ml"}
    same |= {"batch_size": "", "retrain_lr": "", "shots": "10"}
    own = {"finetune": finetune, "trial": str(trial), "metric": metric, "value": str(value)}
    return {**same, **own, **other}


def test_the_fine_tuning_shown_is_the_one_that_validates_better() -> None:
    rows = [
        row(VALIDATION, 0.8, "lora"),
        row(ACCURACY, 0.6, "lora"),
        row(VALIDATION, 0.7, "last-layer"),
        row(ACCURACY, 0.9, "last-layer"),
    ]
    (line,) = best_finetuning(rows)
    assert line["finetune"] == "lora" and line["value"] == pytest.approx(60)


def test_adapters_are_compared_with_heads_alone_by_the_fine_tuning_that_validates_better() -> None:
    def measured(method: str, finetune: str, shots: int, *values: float) -> list[dict[str, str]]:
        named = {"method": method, "shots": str(shots)}
        validation, *accuracies = values
        return [
            row(metric, value, finetune, trial, **named)
            for trial, accuracy in enumerate(accuracies)
            for metric, value in ((VALIDATION, validation), (ACCURACY, accuracy))
        ]

    rows = [
        *measured("standard", "lora", 10, 0.9, 0.9, 0.9),
        *measured("last-layer-ml", "lora", 10, 0.8, 0.6, 0.6),
        *measured("last-layer-ml", "lora", 30, 0.7, 0.7, 0.7),
        *measured("last-layer-ml", "last-layer", 10, 0.7, 0.9, 0.9),
        *measured("lora-ml", "last-layer", 30, 0.9, 0.5, 0.7),
        *measured("lora-ml", "last-layer", 10, 0.9, 0.7, 0.6),
        *measured("lora-ml", "lora", 10, 0.8, 0.9, 0.9),
    ]
    found = results_tables(rows)["last-layer-ml"]
    assert found.header == ["images", "Last-Layer-ML", "LoRA-ML", "trials"]
    assert found.rows == [
        ["10", "60.0 (0.0)", "65.0 (5.0)<br>+5.0 [−58.5, +68.5], 1 of 2", "2"],
        ["30", "70.0 (0.0)", "60.0 (10.0)<br>−10.0 [−137.1, +117.1], 0 of 2", "2"],
    ]
    assert "the difference to Last-Layer-ML [95 %]" in found.caption
    assert "last-layer-ml" not in results_tables([r for r in rows if r["method"] == "lora-ml"])


def test_the_table_compares_trial_by_trial() -> None:
    rows = [
        row(ACCURACY, value, "lora", trial, method=method)
        for method, values in (("standard", (0.5, 0.6)), ("lora-ml", (0.6, 0.8)))
        for trial, value in enumerate(values)
    ]
    assert "70.0 (10.0) +15.0 (-48.5 to +78.5), ahead in 2 of 2" in table(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--flipped", "0.75"], "argument --flipped: must be from 0 to 0.5, got 0.75"),
        (["--flipped", "-0.1"], "--flipped must be"),
        (["--shots", "1"], "argument --shots: must be at least 2, an image of each class, got 1"),
        (["--shots", "500"], "--shots 500: the test task has only"),
        (["--lr", "0.1", "0.2"], "argument --lr: must be one value, or one for each of the 6"),
        (["--inputs", "veiws"], "--inputs"),
        (["--retrain", "standard-steps"], "--retrain"),
        (["--inputs", "low-rank", "--distortion-rank", "5"], "--distortion-rank must be at most 4"),
        (["--equal-steps"], "argument --equal-steps: the conflict experiment has no use for it"),
        (["--rank", "65"], "--rank must be at most 32"),
        (["--data", "cifar10", "--data-root", "nowhere"], "no CIFAR-10 in nowhere"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as ended:
        main(["--data", "digits", "--smoke", "--device", "cpu", "--out", str(out), *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error
    assert not out.exists()


def test_dials_without_effect_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.conflict.figures.draw", lambda run: [])
    given: dict[str, Any] = {**SMALL, "retrain": ("standard",), "finetune": ("last-layer",)}
    given |= {"distortion_rank": 3, "rank": 2, "train_per_class": 999, "flipped": (0.0,)}
    CONFLICT.run(settings(**given, out=tmp_path / "run"))
    said = capsys.readouterr().err
    assert "--distortion-rank has no effect in this run: it is for low-rank only" in said
    assert "--rank has no effect in this run" in said
    assert "--train-per-class 999: a class has at most" in said


def test_models_read_the_images_of_their_data() -> None:
    for name, config in MODELS.items():
        assert (config.channels, config.image_size) == {"cifar10": (3, 16), "digits": (1, 8)}[name]


def test_a_legend_takes_the_rows_that_it_needs() -> None:
    from matplotlib import pyplot as plt

    from experiments.lib import plotting

    plotting.style()
    fig, ax = plt.subplots(figsize=(5, 4))
    for number in range(6):
        ax.plot([0, 1], label=f"A method with a long name, {number}")
    plotting.legend_below(fig, ax)
    (legend,) = fig.legends
    assert legend.get_window_extent().width <= fig.bbox.width
    assert len(legend.get_texts()) == 6
    plt.close(fig)
