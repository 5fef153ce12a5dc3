"""What the pages of docs/ show runs; every function and test that docs/theory.md names exists."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.lib import cli
from experiments.report.registry import MODULES, experiment
from experiments.vision.run import main as vision
from tests.pages import (
    DOCS,
    ROOT,
    all_pages,
    blocks,
    commands,
    decoder_of_this_machine,
    of_this_machine,
    run,
    small_decoder,
    small_roberta,
)

PAGE = (DOCS / "theory.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"`((?:metalora|experiments)\.[\w.]+)`", PAGE)))
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))


def resolve(name: str) -> object:
    """The object of a dotted name: the longest importable module, then attributes."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such module")


def has_test(name: str) -> bool:
    path, _, function = name.partition("::")
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


@pytest.mark.parametrize("name", NAMES)
def test_functions_exist(name: str) -> None:
    assert resolve(name).__doc__


@pytest.mark.parametrize("name", TESTS)
def test_tests_exist(name: str) -> None:
    assert has_test(name)


def test_the_page_names_every_function_of_the_theory_and_every_statement() -> None:
    from experiments.theory.statements import CONTROLS, STATEMENTS
    from metalora.linear import theory

    functions = {f"metalora.linear.theory.{n}" for n in theory.__all__ if n[0].islower()}
    checks = {
        f"{s.check.__module__}.{s.check.__name__}"
        for s in (*STATEMENTS.values(), *CONTROLS.values())
    }
    assert functions | checks <= set(NAMES)
    for number, statement in STATEMENTS.items():
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {number} |"))
        assert f"`{statement.check.__module__}.{statement.check.__name__}`" in row


def test_a_wrong_name_is_noticed() -> None:
    with pytest.raises(AttributeError):
        resolve("metalora.linear.theory.no_such_function")
    with pytest.raises(AssertionError):
        resolve("nothing.at.all")
    assert not has_test("tests/linear/test_theory.py::test_nothing")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages write into the current folder."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def test_the_tutorial_runs_on_real_digits(
    elsewhere: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = run(DOCS / "tutorial.md")
    told = capsys.readouterr().out
    assert re.search(r"^LoRA-ML: \d+\.\d% of 344 held-out images$", told, re.MULTILINE)
    assert re.search(r"^standard retraining: \d+\.\d%$", told, re.MULTILINE)
    assert names["accuracy"](names["other"]) > 0.7
    heads = ["4"]  # what the page's last lines name
    names["meta"].last_layer_ml(names["new_model"](), names["rounds"], names["config"], heads)


HOW_TO = (
    *("own-data", "hugging-face", "causal-loss", "several-processes"),
    *("export", "resume", "routes"),
)


@pytest.mark.parametrize("page", HOW_TO)
def test_how_to_pages_run(page: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "causal-loss":
        pytest.importorskip("transformers")
    if page in ("hugging-face", "export"):
        pytest.importorskip("peft")
        of_this_machine(monkeypatch, small_roberta())
        decoder_of_this_machine(monkeypatch, small_decoder())
    run(DOCS / "how-to" / f"{page}.md")


@pytest.mark.slow
def test_a_run_folder_is_read(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "how-to" / "run-folder.md"
    (module, *arguments), *_ = commands(page)
    assert module == "experiments.vision"
    with pytest.raises(SystemExit) as ended:
        vision(arguments)
    assert ended.value.code == 0
    run(page)
    assert "ahead in" in capsys.readouterr().out
    for name in ("manifest.json", "results.csv", "metrics.jsonl", "units.jsonl", "weights"):
        assert (elsewhere / "runs" / "smoke" / name).exists()


def test_every_block_of_code_is_run() -> None:
    """README.md has tests of its own."""
    tested = {DOCS / "tutorial.md", *(DOCS / "how-to").glob("*.md")}
    assert {page for page in all_pages()[1:] if blocks(page)} == tested
    assert {page.stem for page in (DOCS / "how-to").glob("*.md")} == {*HOW_TO, "run-folder"}


SETTINGS = {
    f"experiments.{name.replace('-', '.')}": experiment(name).settings
    for name in MODULES
    if not MODULES[name].startswith("experiments.synthetic")
}


@pytest.mark.parametrize("page", [p for p in all_pages() if commands(p)], ids=lambda p: p.name)
def test_commands_can_be_typed(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every module exists, and an experiment takes the flags that are shown."""
    for module, *arguments in commands(page):
        assert importlib.util.find_spec(module) is not None, module
        settings: Any = SETTINGS.get(module)
        if module == "experiments.synthetic":
            settings = experiment(arguments.pop(0)).settings
        if settings is not None:
            cli.parse(settings, arguments, prog=module)


def test_a_wrong_flag_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.parse(SETTINGS["experiments.vision"], ["--sots", "10"], prog="vision")
    assert "--shots" in capsys.readouterr().err
