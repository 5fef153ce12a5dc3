from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import matplotlib.pyplot as plt
import pytest
from scipy import stats

from experiments.lib.accuracy_figures import over, shown_of, trials_of
from experiments.lib.statistics import (
    Comparison,
    best_choices,
    compare,
    paired_unit,
    summarize,
    with_error,
)
from experiments.lib.tables import compared, side_by_side

ROWS = [
    {"method": method, "shots": "10", "trial": str(trial), "metric": metric, "value": str(value)}
    for method, metric, values in (
        ("standard", "accuracy", (0.60, 0.70, 0.80)),
        ("lora-ml", "accuracy", (0.65, 0.72, 0.79)),
        ("lora-ml", "loss", (1.0, 2.0, 3.0)),
    )
    for trial, value in enumerate(values)
]


def test_the_interval_is_that_of_the_paired_t_test() -> None:
    ours, theirs = [3.0, 1.0, 4.0, 1.5, 9.0], [2.0, 1.5, 3.0, 1.5, 5.0]
    found = compare(dict(enumerate(ours)), dict(enumerate(theirs)))
    wanted = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), rel=1e-12)
    assert found.difference == pytest.approx(1.1)
    assert (found.ahead, found.trials) == (3, 5)  # a draw is not ahead
    assert compare(dict(enumerate(ours)), dict(enumerate(theirs)), lower_is_better=True).ahead == 1


def test_overlapping_trials_have_wider_intervals() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1. Student's t with 2 degrees of freedom has
    # the 97.5 % quantile 4.302653, and sqrt(1/3 + 2/3) = 1.
    ours, theirs = {0: 2.0, 1: 4.0, 2: 6.0}, {0: 1.0, 1: 2.0, 2: 3.0}
    found = compare(ours, theirs, overlap=2 / 3)
    assert (found.low, found.high) == pytest.approx((2 - 4.302653, 2 + 4.302653), abs=1e-6)
    independent = compare(ours, theirs)
    assert independent.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)
    assert independent == compare(ours, theirs, overlap=0.0)


def test_a_summary_with_overlapping_trials() -> None:
    baseline = {"method": "standard"}

    def half(overlap: float | Callable[[Mapping[str, str]], float]) -> float:
        lines = summarize(
            ROWS, ("method", "shots"), ("accuracy",), baseline=baseline, overlap=overlap
        )
        assert lines[1]["accuracy_se"] == pytest.approx(0.07 / math.sqrt(3))
        found: Comparison = lines[1]["accuracy_vs"]
        return (found.high - found.low) / 2

    # Differences 0.05, 0.02, -0.01: standard deviation 0.03.
    assert half(0.0) == pytest.approx(4.302653 * 0.03 / math.sqrt(3), abs=1e-6)
    assert half(2 / 3) == pytest.approx(4.302653 * 0.03, abs=1e-6)
    assert half(lambda line: {"10": 2 / 3}[line["shots"]]) == half(2 / 3)


def test_only_trials_that_both_made_are_compared() -> None:
    found = compare({0: 5.0, 1: 7.0, 2: 100.0}, {3: -100.0, 1: 6.0, 0: 3.0})
    assert (found.difference, found.trials, found.ahead) == (1.5, 2, 2)
    one = compare({0: 5.0}, {0: 3.0})
    assert one.difference == 2 and math.isnan(one.low) and math.isnan(one.high)
    assert str(one) == "+2.00 (n/a), ahead in 1 of 1"
    with pytest.raises(ValueError, match=r"a trial in common, got \[0\] and \[1\]"):
        compare({0: 5.0}, {1: 3.0})


def test_a_summary_with_a_baseline() -> None:
    standard, lora_ml = summarize(
        ROWS, ("method", "shots"), ("accuracy",), baseline={"method": "standard"}, scale=100
    )
    assert standard["accuracy"] == pytest.approx(70) and standard["accuracy_vs"] is None
    assert standard["accuracy_se"] == pytest.approx(10 / math.sqrt(3))
    found = lora_ml["accuracy_vs"]
    assert (found.difference, found.ahead, found.trials) == (pytest.approx(2), 2, 3)
    assert found.text(".1f") == "+2.0 (-5.5 to +9.5), ahead in 2 of 3"
    (missing,) = summarize(
        ROWS[3:], ("method",), ("accuracy", "loss"), baseline={"method": "standard"}
    )
    assert missing["accuracy_vs"] is None and missing["loss"] == 2
    assert summarize(ROWS[:3], ("method",), ("loss",)) == []


def test_rows_of_a_trial_are_averaged_first() -> None:
    few = {"trial": "0", "metric": "m"}
    rows = [{**few, "value": "1"}, {**few, "value": "2"}, {**few, "trial": "1", "value": "3"}]
    (line,) = summarize(rows, (), ("m",))
    assert (line["trials"], line["m"], line["m_se"]) == (2, 2.25, pytest.approx(0.75))
    (line,) = summarize(rows, (), ("m", "other"))
    assert math.isnan(line["other"]) and math.isnan(line["other_se"])


def one_trial(trial: str = "0") -> list[dict[str, str]]:
    """Accuracies of three tasks in one trial."""
    return [
        {"method": m, "finetune": "lora", "task": str(task), "trial": trial, "metric": "m"}
        | {"value": str(value)}
        for m, values in (("standard", (0.1, 0.2, 0.3)), ("lora-ml", (0.2, 0.4, 0.6)))
        for task, value in enumerate(values)
    ]


def test_the_tasks_of_a_single_trial_stand_for_trials() -> None:
    rows = one_trial()
    assert paired_unit(rows, "m", ("method",)) == ("task", 3)
    assert paired_unit(rows, "m", ("method", "task")) == ("trial", 1)
    assert paired_unit([{**row, "task": ""} for row in rows], "m") == ("trial", 1)
    key = {"finetune": "fine-tuning", "method": "retraining"}
    table = compared(rows, key, "m", "Accuracy.")
    # Differences 10, 20, 30: the interval is 20 ± 4.302653 * 10 / sqrt(3).
    assert table.rows[1] == ["LoRA", "LoRA-ML", "40.0 (11.5)", "+20.0 [−4.8, +44.8]", "3 of 3", "1"]
    told = "One trial: standard errors, intervals and 'ahead' are over the 3 test tasks."
    assert table.caption == f"Accuracy. {told}"
    wide = side_by_side(rows, {"finetune": "fine-tuning"}, "m", "Accuracy.")
    assert wide.rows == [["LoRA", "20.0 (5.8)", "40.0 (11.5)<br>+20.0 [−4.8, +44.8], 3 of 3", "1"]]
    assert wide.caption.endswith(told)


def test_the_tasks_of_several_trials_do_not_stand_for_trials() -> None:
    rows = [*one_trial("0"), *one_trial("1")]
    assert paired_unit(rows, "m", ("method",)) == ("trial", 2)
    table = compared(rows, {"method": "retraining"}, "m", "Accuracy.")
    assert table.rows[1] == ["LoRA-ML", "40.0 (0.0)", "+20.0 [+20.0, +20.0]", "2 of 2", "2"]
    assert table.caption == "Accuracy."


def test_a_single_trial_of_one_task_has_no_error() -> None:
    rows = [row for row in one_trial() if row["task"] == "0"]
    table = compared(rows, {"method": "retraining"}, "m", "Accuracy.")
    assert table.rows[1] == ["LoRA-ML", "20.0", "+10.0", "1 of 1", "1"]
    assert table.caption == "Accuracy. One trial: no error estimate."


def test_figures_say_what_their_bars_are() -> None:
    def lines(*trials: int, error: float = math.nan) -> list[dict[str, float]]:
        return [{"trials": count, "m": 1.0, "m_se": error} for count in trials]

    assert [trials_of(lines(*of)) for of in ((3, 3), (5, 2), (1, 1))] == [
        *("3 trials", "2 to 5 trials", "1 trial"),
    ]
    assert shown_of(lines(2, 5, error=0.1)) == "mean and standard error of 2 to 5 trials"
    assert shown_of(lines(1)) == "1 trial, no error estimate"
    over_tasks = "1 trial, mean and standard error over the test tasks"
    assert shown_of(lines(1, error=0.1)) == over_tasks


@pytest.mark.parametrize(("errors", "bars"), [((0.5, math.nan), 1), ((math.nan, math.nan), 0)])
def test_an_unknown_error_is_not_drawn(errors: tuple[float, ...], bars: int) -> None:
    lines = [
        {"method": "standard", "shots": shots, "m": 1.0, "m_se": error}
        for shots, error in zip(("1", "2"), errors, strict=True)
    ]
    _, ax = plt.subplots()
    over(ax, lines, "shots", ["1", "2"], "m")
    drawn = [s for part in ax.collections for s in part.get_segments() if len(s)]  # type: ignore[attr-defined]
    assert [high[1] - low[1] for low, high in drawn] == [1.0] * bars
    plt.close()


def test_an_error_that_is_not_known() -> None:
    assert with_error(1.234, 0.5) == "1.23 (0.50)"
    assert with_error(1.234, math.nan, ".1f") == "1.2 (n/a)"


def test_the_best_choice_is_that_of_the_mean_over_trials() -> None:
    values = {
        ("a", "0.1"): (1, 9),
        ("a", "0.2"): (6, 6),
        ("b", "0.1"): (3, 3),
        ("b", "0.2"): (3, 3),
    }
    rows = [
        {"method": m, "rate": r, "trial": str(t), "metric": "x", "value": str(value)}
        for (m, r), of in values.items()
        for t, value in enumerate(of)
    ]
    assert best_choices(rows, ("method",), "rate", "x") == {("a",): "0.2", ("b",): "0.1"}
    lowest = best_choices(rows, ("method",), "rate", "x", lower_is_better=True)
    assert lowest == {("a",): "0.1", ("b",): "0.1"}


@pytest.mark.parametrize("lower_is_better", [False, True])
@pytest.mark.parametrize("values", [("nan", "1", "1"), ("1", "nan", "1"), ("nan", "nan", "1")])
def test_a_choice_that_is_not_a_number_is_the_worst(
    values: tuple[str, ...], lower_is_better: bool
) -> None:
    rows = [
        {"rate": str(rate), "trial": "0", "metric": "x", "value": value}
        for rate, value in enumerate(values)
    ]
    found = best_choices(rows, (), "rate", "x", lower_is_better=lower_is_better)
    assert found == {(): str(values.index("1"))}
