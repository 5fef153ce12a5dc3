"""Baselines against closed forms, the trainings on ratings that are known, and the command."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection

from experiments.lib.errors import RunError
from experiments.lib.experiment import command
from experiments.lib.machine import one_thread
from experiments.lib.runs import RunFiles
from experiments.lib.statistics import Comparison
from experiments.ratings import baselines, choose, decays, figures
from experiments.ratings.choose import RATINGS_CHOOSE
from experiments.ratings.data import Part, Ratings, made_up
from experiments.ratings.model import RatingNet
from experiments.ratings.run import RATINGS
from experiments.ratings.settings import CHOSEN, RatingsSettings
from experiments.ratings.summary import (
    OVER_RATINGS,
    RMSE,
    ends_counted,
    overlap_of,
    results_tables,
    summary,
)
from experiments.ratings.trials import Trials
from metalora.adapters import adapted_layers
from tests.processes import needs_gloo, run_processes

CPU = torch.device("cpu")


def part(rows: list[tuple[int, int, float]]) -> Part:
    """Rows of user, item and rating."""
    users, items, values = zip(*rows, strict=True)
    return Part(torch.tensor(items), torch.tensor(values, dtype=torch.float32), torch.tensor(users))


SOME = part([(0, 0, 5), (0, 1, 3), (0, 2, 1), (1, 0, 4), (1, 2, 2), (2, 1, 5)])


def settings(**given: Any) -> RatingsSettings:
    return RatingsSettings(**{"smoke": True, "device": "cpu", **given})


def trials(ratings: Ratings | None = None, **given: Any) -> Trials:
    s = settings(**given).resolved("cpu")
    return Trials(s, made_up() if ratings is None else ratings, s.tasks[0], 0, CPU)


def test_a_users_bias_is_the_shrunk_mean_of_the_residuals() -> None:
    fit = baselines.Factors(3.0, np.array([1.0, 0.0, -1.0]), np.zeros((3, 0)))
    found = fit.fold_in(SOME, 2.0, 1.0)
    expected = [(1 + 0 - 1) / (3 + 2), (0 + 0) / (2 + 2), 2 / (1 + 2)]
    assert found[:, 0] == pytest.approx(expected)
    assert baselines.fitted_biases(np.full(6, 3.0), SOME, 2.0) == pytest.approx(
        [(2 + 0 - 2) / 5, (1 - 1) / 4, 2 / 3]
    )
    predicted = fit.predict(found, SOME)
    assert predicted == pytest.approx([4, 3, 2, 4, 2, 3 + 2 / 3])
    assert fit.predict(np.full((3, 1), 9.0), SOME).max() == 5  # no rating is higher


def test_biases_solve_their_normal_equations() -> None:
    decay = 3.0
    fit = baselines.factorize(SOME, 3, 0, decay, 1.0, 0)
    users, items = SOME.tasks.numpy(), SOME.items.numpy()
    rows = np.zeros((6, 6))  # a column per user, then per item
    rows[np.arange(6), users] = rows[np.arange(6), 3 + items] = 1
    residuals = SOME.values.numpy() - fit.mean
    both = np.linalg.solve(rows.T @ rows + decay * np.eye(6), rows.T @ residuals)
    assert fit.mean == pytest.approx(20 / 6)
    assert fit.biases == pytest.approx(both[3:], abs=1e-6)


def test_folding_in_is_a_ridge_regression() -> None:
    random = np.random.default_rng(0)
    fit = baselines.Factors(3.0, random.normal(size=3), random.normal(size=(3, 2)))
    found = fit.fold_in(SOME, 2.0, 0.5)
    x = np.concatenate([np.ones((2, 1)), fit.factors[[0, 2]]], axis=1)  # the items of user 1
    y = np.array([4.0, 2.0]) - 3.0 - fit.biases[[0, 2]]
    assert found[1] == pytest.approx(np.linalg.solve(x.T @ x + np.diag([2, 0.5, 0.5]), x.T @ y))


def test_factors_find_tastes_that_biases_cannot() -> None:
    errors = {}
    of = trials(made_up(80, 40, biases=0, tastes=1.0, noise=0.2), tasks=(60,), shots=(10,))
    for name in ("global-mean", "biases", "factors"):
        rows = of.baseline(name, 10, 0)
        errors[name] = next(r["value"] for r in rows if r["metric"] == RMSE)
    assert errors["factors"] < 0.8 * errors["biases"]
    values = of.unseen.few(10)[1].values.double()
    mean = of.retraining.values.double().mean()
    whole = (values - mean).square().mean().sqrt().item()  # all users have equally many
    assert errors["global-mean"] == pytest.approx(whole, rel=1e-6)


def test_recentring_leaves_the_predictions() -> None:
    model = RatingNet(5, 3.0, 4, 6)
    torch.nn.init.normal_(model.own.weight)
    torch.nn.init.normal_(model.out.weight)
    items = torch.arange(5)
    before = model(items)
    model.recentre()
    assert torch.allclose(model(items), before) and not model.own.weight.any()


def test_decay_is_that_of_a_users_own_loss() -> None:
    s = settings(adapter_weight_decay=0.5)
    own = s.of_method("lora-ml", 20, CHOSEN["lora-ml"])
    assert own.adapter_weight_decay == 0.025
    assert own.weight_decay == CHOSEN["lora-ml"]["weight_decay"] / 20
    assert s.of_finetune(4.0, 10, 5).finetune_weight_decay == pytest.approx(4.0 / 50)
    given = settings(weight_decay=0.8).of_method("standard", 20, CHOSEN["standard"])
    assert given.weight_decay == 0.04


def losses_of_retraining(**given: Any) -> list[float]:
    _, result = trials(**given).retrain("lora-ml", 0, rank=2)
    return [epoch["loss"] for epoch in result.history]


@needs_gloo
@pytest.mark.slow
@pytest.mark.parametrize(
    ("parallel", "step_per"), [("data", "round"), ("data", "task"), ("tasks", "round")]
)
def test_several_processes_minimise_what_one_does(parallel: str, step_per: str) -> None:
    given = {"step_per": step_per, "tasks": (6,), "finetune": ("none",)}
    alone = losses_of_retraining(**given)
    for found in run_processes(_losses, 2, {**given, "parallel": parallel}):
        assert found == pytest.approx(alone, rel=1e-4)


def _losses(given: dict[str, Any]) -> list[float]:
    return losses_of_retraining(**given)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "kind"), [("lora-ml", "lora"), ("last-layer-ml", "last-layer")])
def test_a_head_start_where_tastes_are_opposite(method: str, kind: str) -> None:
    """Tastes that cancel in the mean over users: only what adapts to each user learns the items."""
    ratings = made_up(80, 40, biases=0, tastes=1.0, noise=0.2)
    of = trials(
        ratings,
        tasks=(60,),
        test_users=12,
        shots=(8,),
        epochs=60,
        batches=4,
        weight_decay=6e-3,
        adapter_weight_decay=0.05,
        finetune_weight_decay=0.5,
        finetune_epochs=60,
    )
    errors = {}
    for name in (method, "standard"):
        model, _ = of.retrain(name, 0, rank=2)
        assert not adapted_layers(model)
        labels = {"method": name, "finetune": kind, "rank": 2, "shots": 8, "trial": 0}
        errors[name] = of.finetune(model, labels)[0]["value"]
    assert errors[method] < 0.85 * errors["standard"]


def exit_code(experiment: Any, arguments: str, *more: str) -> int:
    with pytest.raises(SystemExit) as ended, one_thread():
        command(experiment.name, experiment)([*arguments.split(), *more])
    return int(ended.value.code or 0)


def test_the_command_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    given = "--smoke --seeds 1 --tasks 12 24 --rank 0 2 --shots 3 --retrain lora-ml standard"
    assert exit_code(RATINGS, given, "--out", str(out)) == 0
    printed = capsys.readouterr()
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    measured = [r for r in rows if r["metric"] == RMSE]
    kinds = {(r["method"], r["finetune"], r["rank"]) for r in measured}
    assert kinds == {
        *((name, "", "") for name in ("global-mean", "biases", "factors")),
        *((m, "lora", rank) for m in ("lora-ml", "standard") for rank in ("0", "2")),
        *(("standard", kind, "") for kind in ("last-layer", "user-bias")),
    }
    assert {r["tasks"] for r in measured} == {"12", "24"} and {r["users"] for r in measured} == {
        "10"
    }
    assert all(0 < float(r["value"]) < 4 for r in rows if r["metric"] in (RMSE, OVER_RATINGS))
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["data"] == {"ratings": made_up().sha256}
    of_standard = manifest["notes"]["decay"]["standard with 24 users"]
    assert of_standard == CHOSEN["standard"]
    for name in ("rmse", "tasks", "rank"):
        assert (out / f"{name}.png").stat().st_size > 10_000
        assert (out / f"{name}.csv").read_text().count("\n") > 1
    assert manifest["notes"]["users"] == 60 and "at_ends" not in manifest["notes"]
    assert "Unseen users: 10 at 3 ratings." in printed.out
    assert printed.err == ""


def measured(method: str, trial: int, value: float, kind: str = "lora") -> dict[str, str]:
    """A row of results.csv."""
    same = {"experiment": "ratings", "tasks": "6", "rank": "", "shots": "5", "users": "9"}
    own = {"method": method, "finetune": "" if method == "factors" else kind, "trial": str(trial)}
    return {**same, **own, "metric": RMSE, "value": str(value)}


def run_of(
    folder: Path, rows: list[dict[str, str]], notes: dict[str, Any], **given: Any
) -> RunFiles:
    """A run's folder with these rows."""
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    chosen = {"test_users": 203, "validation_users": 100, "tasks": [6], "rank": [2]}
    found = {"smoke": False, "users": "test", **chosen, **given}
    return RunFiles(folder, {"settings": found, "notes": notes})


THREE = {"lora-ml": (1.0, 2.0, 3.0), "standard": (1.1, 2.2, 3.0), "factors": (0.5, 1.5, 2.5)}


def test_differences_are_paired_by_trial_and_wider_for_shared_users() -> None:
    rows = [measured(m, t, value) for m, of in THREE.items() for t, value in enumerate(of)]
    for overlap in (0.0, 203 / 640):
        first = summary(rows, overlap)[0]
        found = first["rmse_vs_standard"]
        assert found.difference == pytest.approx(-0.1) and (found.ahead, found.trials) == (2, 3)
        # Student's t with two degrees of freedom, corrected as by Nadeau and Bengio
        half = 4.302653 * 0.1 * (1 / 3 + overlap) ** 0.5
        assert (found.low, found.high) == pytest.approx((-0.1 - half, -0.1 + half), abs=1e-6)
        assert first["rmse_vs_factors"].difference == pytest.approx(0.5)


def test_the_overlap_is_that_of_the_test_users_whatever_the_retraining_users(
    tmp_path: Path,
) -> None:
    rows = [measured("standard", 0, 1.0)]
    assert overlap_of(run_of(tmp_path, rows, {})) == 203 / 640  # MovieLens
    assert overlap_of(run_of(tmp_path, rows, {"users": 943}, tasks=[20, 40])) == 203 / 640
    of_smoke = run_of(tmp_path, rows, {"users": 60}, test_users=10, validation_users=8)
    assert overlap_of(of_smoke) == 10 / 42
    assert overlap_of(run_of(tmp_path, rows, {}, users="validation")) == 0


def test_tables_have_corrected_intervals_and_say_how_many_choices_lie_at_an_end(
    tmp_path: Path,
) -> None:
    kinds = [(m, k) for m in ("lora-ml", "standard") for k in ("lora", "user-bias")]
    rows = [measured(m, t, THREE[m][t], kind) for m, kind in kinds for t in range(3)]
    rows += [measured("factors", t, value) for t, value in enumerate(THREE["factors"])]
    tables = results_tables(run_of(tmp_path, rows, {"at_ends": {"a": True, "b": False}}))
    assert set(tables) == {"", "standard", "factors"}
    half = 4.302653 * 0.1 * (1 / 3 + 203 / 640) ** 0.5
    interval = f"[−{0.1 + half:.4f}, +{half - 0.1:.4f}]"
    assert tables["standard"].rows == [["LoRA-ML", "LoRA", f"−0.1000 {interval}, 2 of 3"]]
    assert "corrected for users that trials share" in tables["standard"].caption
    same = results_tables(run_of(tmp_path, rows, {}, users="validation"))["standard"].caption
    assert "95 % interval, over trials with the same users" in same and "corrected" not in same
    assert [line[:2] for line in tables[""].rows] == [
        *(["LoRA-ML", kind] for kind in ("LoRA", "user bias")),
        *(["standard", kind] for kind in ("LoRA", "user bias")),
        ["matrix factorisation", "–"],
    ]
    for table in tables.values():
        assert table.caption.endswith("1 of 2 chosen decays lie at an end of the grid.")
    tables = results_tables(run_of(tmp_path, rows, {}))
    assert tables["standard"].caption.endswith("Unseen users: 9 at 5 ratings.")


def test_an_unknown_interval_is_no_bar() -> None:
    known = Comparison(0.1, 0.0, 0.2, 0, 3)
    unknown = Comparison(0.1, float("nan"), float("nan"), 0, 1)
    fig, ax = plt.subplots()
    figures._with_intervals(ax, [1, 2], [known, unknown])
    (bars,) = ax.collections
    assert isinstance(bars, LineCollection)
    drawn, *none = [segment for segment in bars.get_segments() if np.isfinite(segment).all()]
    assert drawn[:, 1] == pytest.approx([0.0, 0.2]) and not np.size(none)
    plt.close(fig)
    fig, ax = plt.subplots()
    figures._with_intervals(ax, [1], [unknown])
    assert not ax.collections
    plt.close(fig)


def test_a_figure_says_whom_and_what_its_bars_are(tmp_path: Path) -> None:
    rows = [measured(m, t, value) for m, of in THREE.items() for t, value in enumerate(of)]
    run = run_of(tmp_path, rows, {})
    lines = summary(rows, overlap_of(run))
    title = figures._title(run, lines, "rmse_vs_standard", "bars: 95 % interval")
    assert title == "MovieLens: 203 unseen users, 3 trials (bars: 95 % interval)"
    one = summary(rows[::3], 0.0)
    title = figures._title(run, one, "rmse_vs_standard", "bars: 95 % interval")
    assert title == "MovieLens: 203 unseen users, 1 trial"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "argument --data-root: give MovieLens-100K"),
        ("--data-root nowhere", "nowhere does not exist; give ml-100k.inter"),
        ("--smoke --tasks 100", "118 users are needed (100 to retrain, 8 to validate, 10 to test)"),
        ("--smoke --shots 40", "--shots 40: no unseen user has as many ratings"),
        ("--smoke --shots 60", "--shots: must be at most 50, got 60"),
        ("--smoke --rank 18", "--rank must be at most 17, the largest of any linear layer"),
        ("--smoke --rank -1", "--rank must be an int >= 0, got -1"),
        ("--smoke --baselines none biases", "--baselines: none stands alone, got none biases"),
        ("--smoke --baselines bias", 'Did you mean "biases"'),
        ("--smoke --users train", "--users"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(
    arguments: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_code(RATINGS, arguments) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and message in printed.err
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_that_is_not_a_number_is_never_chosen() -> None:
    same = {
        "method": "standard",
        "tasks": "9",
        "rank": "",
        "finetune": "lora",
        "finetune_rank": "2",
    }
    rows = [
        {**same, "candidate": candidate, "finetune_weight_decay": decay, "trial": "0"}
        | {"metric": RMSE, "value": value}
        for candidate, decay, value in (("a", "1", "nan"), ("b", "1", "0.9"), ("b", "2", "nan"))
    ]
    for order in (rows, rows[::-1]):
        found = decays.tried(order)
        assert decays.best(found) == {("standard", "9", ""): "b"}
        assert found["standard", "9", ""]["b"]["lora", "2"] == (0.9, "1")


def test_users_with_too_few_ratings_are_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        f"{user}\t{item}\t{1 + (user + item) % 5}\t0\n"
        for user in range(60)
        for item in range(30 if user % 2 else 16)
    ]
    (tmp_path / "u.data").write_text("".join(lines))
    given = "--smoke --seeds 1 --shots 10 --retrain standard --finetune none --baselines biases"
    data = ("--data-root", str(tmp_path / "u.data"))
    assert exit_code(RATINGS, given, *data, "--out", str(tmp_path / "a")) == 0
    error = capsys.readouterr().err
    assert "is not MovieLens-100K as published: 1380 ratings of 60 users for 30 items" in error
    assert "of 10 users are left out, who have fewer than 20 ratings; --list-users" in error
    assert exit_code(RATINGS, given, *data, "--list-users", "--out", str(tmp_path / "b")) == 0
    listed = capsys.readouterr().err.splitlines()[-1].rpartition(": ")[2].split()
    assert listed and all(int(user) % 2 == 0 for user in listed)


@pytest.mark.slow
def test_an_interrupted_run_resumed_equals_one_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.ratings.figures.draw", lambda *_: [])
    given: dict[str, Any] = {"retrain": ("lora-ml", "standard"), "seeds": 1, "shots": (3,)}
    RATINGS.run(settings(**given, out=tmp_path / "whole"))
    whole = (tmp_path / "whole" / "results.csv").read_text()
    original, calls = Trials.finetune, []

    def stop_in_the_third(*args: Any, **keywords: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **keywords)

    monkeypatch.setattr(Trials, "finetune", stop_in_the_third)
    cut = tmp_path / "cut"
    with pytest.raises(SystemExit):
        RATINGS.run(settings(**given, out=cut))
    part = (cut / "results.csv").read_text()
    assert whole.startswith(part) and part != whole
    with pytest.raises(RunError, match=r"other settings .*: held_out \(was"):
        RATINGS.run(settings(**given, held_out=9, out=cut, resume=True))
    RATINGS.run(settings(**given, out=cut, resume=True))
    assert (cut / "results.csv").read_text() == whole


SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("lora-ml", {"adapter_lr": 1e-4}),
    ("lora-ml", {"adapter_weight_decay": 9.0}),
    ("lora-ml", {"adapter_steps": 2}),
    ("lora-ml", {"order": "rounds"}),
    ("lora-ml", {"weighting": "users"}),
    ("last-layer-ml", {"weighting": "users"}),
    ("last-layer-ml", {"shared_head": "refit"}),
    ("standard", {"standard_order": "blocked"}),
    ("standard", {"weight_decay": 50.0}),
    ("standard", {"batches": 4}),
    ("standard", {"embedding": 8}),
    ("standard", {"hidden": 8}),
    ("reptile", {"reptile_inner_steps": 1}),
    ("reptile", {"reptile_inner_lr": 1e-3}),
    ("reptile", {"reptile_optimizer": "adam"}),
]


@pytest.mark.slow
def test_each_switch_of_retraining_does_something() -> None:
    def retrained(method: str, **given: Any) -> torch.Tensor:
        model, _ = trials(**given).retrain(method, 0, rank=2)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain = {method: retrained(method) for method in RatingsSettings.methods}
    for method, switch in SWITCHES:
        assert not torch.equal(retrained(method, **switch), plain[method]), (method, switch)
    repeated = retrained("lora-ml")
    assert torch.equal(repeated, plain["lora-ml"])


def test_the_choice_is_the_lowest_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = "--smoke --retrain standard --finetune last-layer"
    assert exit_code(RATINGS_CHOOSE, given, "--out", str(tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    candidate = decays.name(next(decays.candidates("standard", None)))
    assert candidate in printed and " chosen\n" in printed
    assert exit_code(RATINGS_CHOOSE, "--smoke --weight-decay 1") == 2
    assert "--weight-decay: the grid holds it" in capsys.readouterr().err
    # The smoke run has one candidate, but every decay of fine-tuning.
    assert " of 1 chosen decays lie at an end of the grid." in printed

    def row(candidate: str, kind: str, decay: str, trial: int, value: float) -> dict[str, str]:
        same = {"method": "lora-ml", "tasks": "9", "rank": "2", "metric": RMSE, "shots": "5"}
        own = {"candidate": candidate, "finetune": kind, "finetune_weight_decay": decay}
        own |= {"finetune_rank": "2" if kind == "lora" else "", "trial": str(trial)}
        return {**same, **own, "value": str(value)}

    rows = [
        *(row("a", "lora", "1", t, v) for t, v in enumerate((1.0, 1.2))),
        *(row("a", "lora", "2", t, v) for t, v in enumerate((0.8, 1.6))),
        *(row("b", "lora", "1", t, v) for t, v in enumerate((1.0, 1.4))),
        row("a", "last-layer", "1", 0, 2.0),
        row("b", "last-layer", "1", 0, 0.1),  # not what LoRA-ML is made for
    ]
    found = decays.tried(rows)
    key = "lora-ml", "9", "2"
    assert decays.best(found) == {key: "a"}
    assert found[key]["a"]["lora", "2"] == (pytest.approx(1.1), "1")


def test_decays_are_taken_for_each_number_of_users_and_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "choice", tmp_path / "run"
    sizes = "--smoke --retrain lora-ml standard --finetune lora --tasks 12 24 --rank 0 2"
    assert exit_code(RATINGS_CHOOSE, sizes, "--out", str(source)) == 0
    # The first candidate of the grid is all that a smoke run tries; another one wins here.
    smallest = "--weight-decay 0.025 "
    rows = (source / "results.csv").read_text().replace(smallest, "--weight-decay 9 ")
    (source / "results.csv").write_text(rows)
    run = f"{sizes} --seeds 1 --baselines none --decays-from {source} --out {out}"
    assert exit_code(RATINGS, run) == 0
    chosen = json.loads((out / "manifest.json").read_text())["notes"]["decay"]
    of_lora_ml = {"weight_decay": 9.0, "adapter_weight_decay": 0.001}
    assert chosen["lora-ml with 12 users and rank 2"] == of_lora_ml
    assert chosen["lora-ml with 24 users and rank 0"]["weight_decay"] == 0.03  # standard's grid
    of_finetuning = chosen["standard with 24 users: fine-tuning, lora, rank 2"]
    assert of_finetuning in decays.FINETUNE_GRID["lora"]
    ends = json.loads((out / "manifest.json").read_text())["notes"]["at_ends"]
    # One candidate, and one decay at rank 0, are no choice.
    assert set(ends) == {
        f"{method}{rank}: fine-tuning, lora, rank 2: finetune_weight_decay"
        for users in (12, 24)
        for method, rank in ((f"lora-ml with {users} users", " and rank 2"),)
    } | {
        f"standard with {users} users: fine-tuning, lora, rank 2: finetune_weight_decay"
        for users in (12, 24)
    }
    grid = decays.FINETUNE_GRID["lora"]
    at_end = "standard with 24 users: fine-tuning, lora, rank 2: finetune_weight_decay"
    assert ends[at_end] == (of_finetuning in (grid[0], grid[-1]))
    counted = f"{sum(ends.values())} of 4 chosen decays lie at an end of the grid."
    assert counted in capsys.readouterr().out

    capsys.readouterr()
    for change, message in (
        ("--tasks 13", "has not tried lora-ml with 13 users and rank 0; resume it or choose"),
        ("--finetune all --rank 2", "has not tried last-layer after standard with 12 users"),
        ("--epochs 3", "has epochs 2, not 3; choose anew"),
        ("--weight-decay 1", "argument --weight-decay: contradicts --decays-from"),
    ):
        assert exit_code(RATINGS, f"{run}x {change}") == 2
        assert message in capsys.readouterr().err
    resumed = f"{sizes} --finetune all --resume --out {source}"
    assert exit_code(RATINGS_CHOOSE, resumed) == 2
    assert "other settings than the run in" in capsys.readouterr().err
    rows = rows.replace("--weight-decay 9 ", "--weight-decay 8 ")
    (source / "results.csv").write_text(rows)
    assert exit_code(RATINGS, f"{run} --resume") == 2
    assert "was {'weight_decay': 9.0, 'adapter_weight_decay': 0.001}" in capsys.readouterr().err


def test_choices_at_an_end_of_what_was_tried_are_found() -> None:
    def row(weight: str, own: str, kind: str, decay: str, value: float) -> dict[str, str]:
        name = f"--weight-decay {weight} --adapter-weight-decay {own}"
        same = {"method": "lora-ml", "tasks": "9", "rank": "2", "shots": "5", "trial": "0"}
        rank = {"finetune": kind, "finetune_rank": "2" if kind == "lora" else ""}
        tried = {"candidate": name, "finetune_weight_decay": decay, "metric": RMSE}
        return {**same, **rank, **tried, "value": str(value)}

    rows = [
        row(weight, own, "lora", decay, abs(float(weight) - 2) + float(own) + float(decay))
        for weight in ("1", "2", "3")
        for own in ("0.1", "0.2", "0.3")
        for decay in ("4", "8")
    ]
    rows += [row("2", "0.1", "last-layer", "7", 1.0)]  # nothing to choose from
    found = decays.best_decays(rows)
    key = "lora-ml", "9", "2"
    assert found.retrainings == {key: {"weight_decay": 2.0, "adapter_weight_decay": 0.1}}
    assert found.finetunings == {(key, ("lora", "2")): 4.0, (key, ("last-layer", "")): 7.0}
    assert found.ends == {
        "lora-ml with 9 users and rank 2: weight_decay": False,
        "lora-ml with 9 users and rank 2: adapter_weight_decay": True,
        "lora-ml with 9 users and rank 2: fine-tuning, lora, rank 2: finetune_weight_decay": True,
    }
    counted = "2 of 3 chosen decays lie at an end of the grid."
    assert ends_counted(found.ends) == counted and choose.table(rows).caption.endswith(counted)
    assert ends_counted({}) == ""
