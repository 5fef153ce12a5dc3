from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import json
from pathlib import Path

import pytest
import torch

from experiments.theory import checks, run
from experiments.theory.settings import TheorySettings
from experiments.theory.statements import CONTROLS, STATEMENTS, landscape, recovery
from metalora._library import native_available
from metalora.linear import theory

FIGURES = ("standard-loss", "finetuning-error", "hyperbola", "spurious-minimum", "descent")
native_only = pytest.mark.skipif(
    not native_available(), reason="takes minutes without the native library"
)


def command(*arguments: str) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    return int(caught.value.code or 0)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The smoke run of everything: its folder and output."""
    if not native_available():
        pytest.skip("takes minutes without the native library")
    folder = tmp_path_factory.mktemp("theory") / "run"
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        code = command("--smoke", "--out", str(folder))
    assert code == 0, output.getvalue() + error.getvalue()
    assert error.getvalue() == ""  # no progress bar where there is no terminal
    return folder, output.getvalue()


@pytest.mark.slow
def test_it_ends_with_twelve_verdicts_none_assumed(smoke: tuple[Path, str]) -> None:
    folder, output = smoke
    last = output.split("\nstatement ")[1].split("\nresults: ")[0].splitlines()[1:]
    verdicts = {line.split()[0]: line.split()[-1] for line in last if not line.startswith(" ")}
    assert verdicts == dict.fromkeys(STATEMENTS, "verified")
    for name in STATEMENTS:
        stored = json.loads((folder / f"statement-{name}.json").read_text())["checks"]
        assert len(stored) >= 4 and all(c["holds"] for c in stored)
        assert all(isinstance(c["measured"], float) for c in stored)


@pytest.mark.slow
def test_wrong_statements_are_refuted(smoke: tuple[Path, str]) -> None:
    folder, output = smoke
    first = output.split("wrong on purpose")[1].split("\nstatement ")[0]
    for name in CONTROLS:
        assert "refuted" in next(ln for ln in first.splitlines() if ln.startswith(name))
        stored = json.loads((folder / f"statement-{name}.json").read_text())["checks"]
        assert not all(c["holds"] for c in stored)


@pytest.mark.slow
def test_the_run_folder_holds_every_check_and_figure(smoke: tuple[Path, str]) -> None:
    folder, output = smoke
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["statement"] for r in rows} == {*STATEMENTS, *CONTROLS}
    assert all(r["holds"] == "True" for r in rows if r["verdict"] == "verified")
    for figure in FIGURES:
        assert (folder / f"{figure}.png").read_bytes()[:4] == b"\x89PNG"
        assert (folder / f"{figure}.csv").is_file()
        assert f"{figure}.png" in output
    assert json.loads((folder / "manifest.json").read_text())["status"] == "completed"


@pytest.mark.slow
def test_the_spurious_minimum_is_found_again(smoke: tuple[Path, str]) -> None:
    """Saved with the seed that finds it: from the numbers saved, and by another search."""
    stored = json.loads((smoke[0] / "statement-11.json").read_text())["data"]
    true = torch.tensor(stored["true_factors"], dtype=torch.float64)
    factors = torch.tensor(stored["factors"], dtype=torch.float64)
    truths = true @ true.mT
    assert true.shape == factors.shape == (3, 3, 1)
    certificate = theory.local_minimum(truths, factors)
    assert dataclasses.asdict(certificate) == pytest.approx(
        stored["certificate"], rel=1e-6, abs=1e-14
    )
    assert certificate.loss > 1e-4 * float(truths.square().sum())
    assert certificate.gradient_norm < 1e-12 and certificate.curvature > 0 < certificate.rise
    assert float(torch.linalg.eigvalsh(theory.reduced_hessian(truths, factors))[0]) > 0
    assert theory.rise_on_net(truths, factors, certificate.radius)[0] >= certificate.rise
    # The same problem has a global minimum with zero loss: no other truths, no rank missing.
    assert float(theory.reduced_loss(truths, true)) == 0
    seed, again, minimum = landscape.find_spurious_minimum(stored["seed"])
    assert seed == stored["seed"]
    torch.testing.assert_close(again, true)
    torch.testing.assert_close(minimum, factors, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_resuming_checks_only_what_is_missing(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    arguments = ["2", "10", "--smoke", "--out", str(folder)]
    assert command(*arguments) == 0
    table = capsys.readouterr().out.split("results:")[0]
    complete = (folder / "results.csv").read_text()
    assert command(*arguments) == 2
    assert "--resume" in capsys.readouterr().err
    units = (folder / "units.jsonl").read_text().splitlines(keepends=True)
    (folder / "units.jsonl").write_text(units[0])
    kept = (folder / "statement-2.json").stat().st_mtime_ns
    assert command(*arguments, "--resume") == 0
    assert (folder / "results.csv").read_text() == complete
    assert (folder / "statement-2.json").stat().st_mtime_ns == kept
    assert capsys.readouterr().out.split("results:")[0] == table
    (folder / "statement-2.json").write_text("{")
    assert command(*arguments, "--resume") == 2
    assert "statement-2.json cannot be read" in capsys.readouterr().err


def test_a_refuted_statement_is_the_exit_code(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    wrong = dataclasses.replace(STATEMENTS["2"], check=CONTROLS["wrong-2"].check)
    monkeypatch.setitem(run.ALL, "2", wrong)
    monkeypatch.setattr("experiments.theory.figures._FIGURES", {})
    assert command("2", "--smoke", "--out", str(tmp_path / "run")) == 1
    assert command("wrong-2", "--smoke", "--out", str(tmp_path / "control")) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["13"],
            '"1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "wrong-2"',
        ),
        (["3", "wrong-8"], 'Did you mean "wrong-'),
        (["--noise", "-0.1"], "noise must be a finite number > 0, got -0.1"),
        (["--inner-lr", "nan"], "--inner-lr must be a finite number > 0, got nan"),
        (["--seed", "-1"], "seed must be an int >= 0, got -1"),
        (["--smok"], "Unknown option: --smok. Did you mean --smoke?"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, capsys) -> None:  # type: ignore[no-untyped-def]
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@native_only
def test_divergence_names_the_step_and_leaves_the_folder_whole(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "run"
    assert command("2", "12", "--smoke", "--inner-lr", "1", "--out", str(folder)) == 2
    error = capsys.readouterr().err
    assert "statement 12 diverged; lower --outer-lr or --inner-lr (lora_ml:" in error
    assert "not finite at step" in error and error.count("\n") == 1
    assert json.loads((folder / "manifest.json").read_text())["status"] == "failed"
    with (folder / "results.csv").open(newline="") as file:
        assert {r["statement"] for r in csv.DictReader(file)} == {"2"}
    assert json.loads((folder / "statement-2.json").read_text())["checks"]


def test_a_seed_repeats(tmp_path: Path) -> None:
    settings = TheorySettings(statements=("2",), smoke=True)
    first, second = (STATEMENTS["2"].check(settings) for _ in range(2))
    assert first == second
    other = STATEMENTS["2"].check(dataclasses.replace(settings, seed=1))
    assert first.checks[0].measured != other.checks[0].measured


@native_only
def test_recovery_is_verified_with_three_tasks_and_refuted_with_two() -> None:
    settings = TheorySettings(smoke=True)
    assert recovery.exact_recovery(settings, "6", ((3, 1, 6),)).holds
    assert not recovery.exact_recovery(settings, "6", ((2, 1, 6),)).holds


def test_checks_can_fail() -> None:
    made = checks.Checks()
    normal = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert made.mean_equals("", 1 + 0.1 * normal, 1.0, 0.01).holds
    assert not made.mean_equals("", 1 + 0.1 * normal, 1.02, 0.01).holds  # off
    assert not made.mean_equals("", 1 + 3.0 * normal, 1.0, 0.01).holds  # too coarse
    assert made.mean_at_least("", 1 + normal, 0.5).holds
    assert not made.mean_at_least("", 1 + normal, 1.0).holds
    x = [1.0, 2.0, 4.0]
    powers = [v**2 * (1 + 0.1 * normal) for v in x]
    slope, error = checks.fit_exponent(x, powers)
    assert abs(slope - 2) < 4 * error < 0.02
    assert made.exponent_equals("", x, powers, 2.0, 0.05).holds
    assert not made.exponent_equals("", x, powers, 1.9, 0.05).holds
    coarse = [v**2 * (1 + 0.1 * normal[:3]) for v in x]
    assert not made.exponent_equals("", x, coarse, 2.0, 0.05).holds
    hits = torch.ones(100, dtype=torch.bool)
    assert made.all_of("", hits, 100).holds and not made.all_of("", hits, 101).holds
    assert not made.all_of("", torch.tensor([True, False])).holds
    assert not made.all_of("", hits[:0]).holds
    assert made.share_at_least("", hits, 0.9).holds
    assert not made.share_at_least("", hits, 0.92).holds
    assert made.share_at_most("", ~hits, 0.1).holds
    assert not made.share_at_most("", ~hits, 0.08).holds
    nan = float("nan")
    assert made.at_most("", 1.0, 1.0).holds and not made.at_most("", nan, 1.0).holds
    assert made.at_least("", 1.0, 1.0).holds and not made.at_least("", nan, 1.0).holds
    assert not checks.Outcome([]).holds
    assert not all(check.holds for check in made) and any(check.holds for check in made)
    made.at = "d=3"
    assert made.at_most("loss", 1.0, 2.0).what == "loss, d=3"
    assert made.all_of("runs", hits).what == "runs, d=3 (100 of 100)"


def test_share_intervals_are_exact() -> None:
    tail = (1 - checks.LEVEL) / 2
    assert checks.share_interval(0, 100) == pytest.approx((0, 1 - tail**0.01))
    assert checks.share_interval(100, 100) == pytest.approx((tail**0.01, 1))
    low, high = checks.share_interval(30, 100)
    weights = torch.distributions.Binomial(100, torch.tensor([low, high], dtype=torch.float64))
    chances = weights.log_prob(torch.arange(101, dtype=torch.float64)[:, None]).exp()
    assert float(chances[30:, 0].sum()) == pytest.approx(tail, rel=1e-6)
    assert float(chances[:31, 1].sum()) == pytest.approx(tail, rel=1e-6)
