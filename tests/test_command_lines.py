"""Every command: help that fits a page, and for each mistake one line and exit code 2."""

from __future__ import annotations

import re
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from experiments.lib import cli
from experiments.lib.machine import choose_device
from tests.processes import start_interruptible

ROOT = Path(__file__).parents[1]
LAYERS = str(ROOT / "benchmarks" / "results" / "lora_linear_cpu.json")
KERNELS = str(ROOT / "benchmarks" / "results" / "kernel_resources.json")
LAYER, LINEAR = "benchmarks.lora_linear", "benchmarks.linear_training"
SHALLOW = "benchmarks.shallow_training"
DIGITS = ("experiments.vision", "--smoke", "--data", "digits")
TINY = ("experiments.language", "--smoke")


def commands() -> list[str]:
    """The modules that ``python -m`` runs."""
    found = []
    for path in sorted(
        p for top in ("benchmarks", "experiments") for p in (ROOT / top).rglob("*.py")
    ):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__main__.py" or 'if __name__ == "__main__":' in path.read_text():
            found.append(name.removesuffix(".__main__"))
    return ["metalora", *found]


def test_all_that_stands_in_benchmarks_is_a_command() -> None:
    """What they share stands in benchmarks/lib: run by itself, it would do nothing."""
    modules = {f"benchmarks.{p.stem}" for p in (ROOT / "benchmarks").glob("*.py")}
    assert modules - set(commands()) == {"benchmarks.__init__"}


def run(module: str, *arguments: str) -> int:
    """Runs a command in this process and returns its exit code."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setattr(sys, "argv", [module, *arguments])
        warnings.simplefilter("ignore", RuntimeWarning)  # the module may be imported already
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    return int(ended.value.code or 0)


def check_refused(
    error: str, code: int, folder: Path, message: str, before: tuple[str, ...] = ()
) -> None:
    assert code == 2
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert sorted(p.name for p in folder.iterdir()) == sorted(before)


@pytest.mark.parametrize("module", commands())
@pytest.mark.parametrize("mistake", ["--nonsense", "nonsense"])
def test_what_no_command_knows(
    module: str,
    mistake: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(module, mistake)
    printed = capsys.readouterr()
    assert printed.out == ""
    check_refused(printed.err, code, tmp_path, "nonsense")


@pytest.mark.parametrize("module", [*commands(), "linear", "shallow", "phase"])
def test_help(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    called = (
        [module] if "." in module or module == "metalora" else ["experiments.synthetic", module]
    )
    assert run(*called, "--help") == 0
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.lower().startswith(f"usage: python -m {called[0]}")
    assert max(map(len, printed.out.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*DIGITS, "--device", "meta"), "--device meta cannot be used here; try auto or cpu"),
        ((*DIGITS, "--device", "cdua"), "did you mean 'cuda'"),
        ((*DIGITS, "--device", "mkldnn"), "--device mkldnn cannot be used here; try auto or cpu"),
        ((*DIGITS, "--device", "cuda:99"), "--device cuda:99 cannot be used here; try auto or cpu"),
        ((*DIGITS, "--batch-size", "9" * 20), "--batch-size: must be at most 10^18, got 999"),
        ((*DIGITS, "--rank", "999999999"), "--rank must be at most 32, the largest of any linear"),
        ((*DIGITS, "--seeds", "999999999"), "--seeds must be an int <= 10000, got 999999999"),
        ((*DIGITS, "--lr", "inf"), "--lr must be a finite number > 0, got inf"),
        ((*DIGITS, "--out", ""), "--out: must be a path, got ''"),
        ((*DIGITS, "--out", "a\nb"), r"--out: must be a path, got 'a\nb'"),
        ((*DIGITS, "--out", "/dev/null"), "/dev/null: Not a directory"),
        ((*DIGITS, "--out", "/dev/null/x"), "cannot make output folder /dev/null/x"),
        ((*DIGITS, "--out", "x" * 300), "File name too long"),
        (("experiments.vision", "--data-root", "/dev/null"), "/dev/null"),
        ((*TINY, "--device", "meta"), "--device meta cannot be used here"),
        ((*TINY, "--rank", "8", "999999999"), "--rank must be at most "),
        ((*TINY, "--model", "nowhere"), "nowhere"),
        ((*TINY, "--resume", "--out", "nowhere"), "nowhere holds no run"),
        (("experiments.language", "--data", "nowhere"), "nowhere"),
        (("experiments.synthetic",), "which experiment?"),
        (("experiments.synthetic", "liner"), 'Did you mean "linear"?'),
        (
            ("experiments.synthetic", "linear", "--trials", "99999"),
            "trials must be an int <= 10000",
        ),
        (("experiments.synthetic", "phase", "--ranks", "-1"), "ranks must be an int >= 1, got -1"),
        (("experiments.theory", "13"), 'Choose from: "1", "2", "3"'),
        (("benchmarks.plot",), "FILES requires an argument"),
        (("benchmarks.plot", LAYERS, "nowhere"), "nowhere cannot be read: No such file"),
        (("benchmarks.plot", KERNELS), "resources.json is not a file of results of an operator"),
        (("benchmarks.plot", __file__), "test_command_lines.py is damaged or no JSON file"),
        (("benchmarks.plot", LAYERS, "--write", "/dev/null/x"), "--write: /dev/null is not a fol"),
        ((LAYER, "--cases", "nope"), "is called 'nope'"),
        ((LAYER, "--cases", "gaol"), "did you mean 'goal'"),
        ((LAYER, "--budget-seconds", "nan"), "--budget-seconds must be a finite"),
        ((LAYER, "--name", "../x"), "--name: must be a file name, got '../x'"),
        ((LAYER, "--resume"), "--resume: needs --write"),
        ((SHALLOW, "--threads", "-1"), "--threads must be an int >= 1, got -1"),
        ((SHALLOW, "--threads", "9999999"), "--threads must be an int <="),
        ((LINEAR, "--write", __file__), "test_command_lines.py is not a folder"),
        (("benchmarks.steps", "--cases", "mixr"), "called 'mixr'; did you mean 'mixer'"),
        (("benchmarks.steps", "--precisions", "bf16"), "--precisions: the versions of steps have"),
        (("benchmarks.steps", "--frozen"), "--frozen: steps has no case with frozen weights"),
        (("benchmarks.language", "--turns", "0"), "--turns must be an int >= 1, got 0"),
        (("benchmarks.language", "--data", "x"), "--data: needs --tokenizer FOLDER"),
        (("benchmarks.curves",), "nothing to train; give CIFAR-10's folder with --images"),
        (("benchmarks.curves", "--dialogues", "x"), "--dialogues: needs --tokenizer FOLDER"),
        (("benchmarks.curves", "--images", "x"), "no CIFAR-10 in x"),
        (("benchmarks.gpu_report", "--part", "biuld"), "there is no 'biuld'; there are build, "),
        (("benchmarks.gpu_report", "--part", "biuld"), "did you mean 'build' or"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(*arguments)
    check_refused(capfd.readouterr().err, code, tmp_path, message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "arguments",
    [
        ("benchmarks.merge_lora", "--device", "cuda"),
        ("experiments.synthetic", "linear", "--device", "cuda"),
        (*DIGITS, "--device", "cuda"),
    ],
)
def test_a_gpu_that_is_not_there_is_one_line(
    arguments: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code = run(*arguments)
    check_refused(capsys.readouterr().err, code, tmp_path, "cuda")


@pytest.mark.parametrize("flag", ["--outer-steps", "--finetune-steps"])
def test_what_no_memory_can_hold_is_one_line_and_leaves_no_folder(
    flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # More than any address space: nothing is allocated. --smoke would cut the steps down.
    code = run(
        "experiments.synthetic", "linear", "--trials", "1", "--outer-steps", "1", flag, "9" * 18
    )
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("error: not enough memory for these settings")
    assert code == 2
    assert not list(tmp_path.rglob("*.json"))


def test_a_device_that_computes_is_taken() -> None:
    assert choose_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file or directory", "a/b"), "a/b: No such file"),
        (OSError("the disk is full"), "the disk is full"),
        (MemoryError("Unable to allocate 7 TiB"), "not enough memory for these settings"),
        (RuntimeError("CUDA out of memory. Tried\nto"), "not enough memory for these settings"),
    ],
)
def test_errors_of_the_machine(
    error: Exception, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @cli.main_guard
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    check_refused(capsys.readouterr().err, 2, tmp_path, message)


def test_another_runtime_error_keeps_its_traceback() -> None:
    @cli.main_guard
    def main() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        main()


@pytest.mark.slow
def test_a_process_ends_with_the_same_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "metalora", "nonsense"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(r"error: unexpected argument 'nonsense'; usage: .*\n", done.stderr)


@pytest.mark.slow
def test_ctrl_c_is_one_line() -> None:
    code = (
        "import time; from experiments.lib import cli\n"
        "@cli.main_guard\ndef main(): print('ready', flush=True); time.sleep(60)\nmain()"
    )
    process = start_interruptible([sys.executable, "-c", code], cwd=ROOT)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=240)
    assert (process.returncode, error) == (130, "interrupted\n")
