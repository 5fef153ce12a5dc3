from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from experiments.lib import cli
from experiments.lib.errors import RunError
from metalora._checks import check_positive


@dataclasses.dataclass(frozen=True)
class Settings:
    data: str = cli.option("digits", help="the data", choices=("cifar10", "digits"))
    retrain: tuple[str, ...] = cli.option(("lora-ml",), choices=("lora-ml", "standard", "all"))
    vary: str = cli.option("T", choices=("T", "n", "all"), positional=True)
    lr: float = cli.option(0.5, help="rate")
    epochs: int | None = cli.option(None)
    out: Path | None = cli.option(None, run_only=True)
    smoke: bool = cli.option(False)
    bias: bool = cli.option(True)

    def __post_init__(self) -> None:
        check_positive("settings", "lr", self.lr)


def parse(*argv: str) -> Settings:
    return cli.parse(Settings, argv, prog="prog", description="A test.")


def test_defaults_are_the_dataclass() -> None:
    assert parse() == Settings()


def test_every_type_of_field() -> None:
    given = parse(
        *("n", "--data", "cifar10", "--retrain", "standard", "lora-ml", "--lr", "1e-3"),
        *("--epochs", "3", "--out", "a/b", "--smoke", "--no-bias"),
    )
    assert given == Settings(
        "cifar10", ("standard", "lora-ml"), "n", 1e-3, 3, Path("a/b"), True, False
    )


def test_of_a_flag_given_twice_the_last_counts() -> None:
    assert parse("--lr", "1", "--lr", "2", "--smoke", "--smoke").lr == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--retrian", "all"], "Unknown option: --retrian. Did you mean --retrain?"),
        (
            ["--retrain", "lora_ml"],
            'Choose from: "lora-ml", "standard", "all". Did you mean "lora',
        ),
        (["--data", "cifar"], 'Invalid value "cifar" for --data'),
        (["--epochs", "2.5"], "for --epochs: must be a whole number, got '2.5'; see prog --help"),
        (["--lr", "fast"], "for --lr: must be a number, got 'fast'"),
        (["--data", "cifar"], 'Did you mean "cifar10"?'),
        (["--epochs", "9" * 19], "for --epochs: must be at most 10^18, got 9999999999999999999"),
        (["--out="], "for --out: must be a path, got ''"),
        (["--out", "a\tb"], r"for --out: must be a path, got 'a\tb'"),
        (["--retrain"], "--retrain requires at least 1 element"),
        (["--lr"], "--lr requires an argument"),
        (["--lr", "nan"], "lr must be a finite number > 0, got nan"),
        (["T", "n"], "Unused Tokens: ['n']; see prog --help"),
        (["--epo", "3"], "Unknown option: --epo. Did you mean --epochs?"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert message in printed.err


def test_help_names_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--help")
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(flag in text for flag in ("--data", "--retrain", "--epochs", "--no-bias", "VARY"))
    assert "rate [default: 0.5]" in text


def test_guard_shows_what_the_user_can_put_right_as_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    @cli.main_guard
    def main(error: BaseException) -> None:
        raise error

    for error in (RunError("no\nfolder"), ValueError("no folder")):
        with pytest.raises(SystemExit) as ended:
            main(error)
        assert ended.value.code == 2
        assert capsys.readouterr().err == "error: no folder\n"
    with pytest.raises(SystemExit) as ended:
        main(KeyboardInterrupt())
    assert ended.value.code == 130
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        main(ZeroDivisionError())
