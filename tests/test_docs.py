"""Every function, test and command that docs/theory.md names exists."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
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
