from __future__ import annotations

import math

import pytest
from scipy import stats

from experiments.lib.statistics import best_choices, compare, summarize, with_error

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
