from __future__ import annotations

from itertools import combinations
from math import prod

import pytest

from tests.pairs import covering_rows, every_pair


@pytest.mark.parametrize("counts", [(2, 3), (8, 11, 4), (12, 3, 5), (2, 2, 2, 2, 2), (1, 4, 1, 3)])
def test_any_two_values_meet(counts: tuple[int, ...]) -> None:
    rows = covering_rows(counts)
    assert len(set(rows)) == len(rows)
    for a, b in combinations(range(len(counts)), 2):
        assert len({(row[a], row[b]) for row in rows}) == counts[a] * counts[b]
    longest = sorted(counts)[-1] * sorted(counts)[-2]
    assert longest <= len(rows) <= min(prod(counts), 2 * longest)


@every_pair(letter="ab", number=[1, 2], flag=[True, False])
def test_cases_have_the_values_of_their_parameters(number: int, letter: str, flag: bool) -> None:
    assert number in (1, 2) and letter in ("a", "b") and flag in (True, False)


def test_the_cases_are_fewer_than_all() -> None:
    (mark,) = every_pair(letter="ab", number=[1, 2], flag=[True, False]).args[1:]
    assert 4 <= len(mark) < 8
    assert len({parameters.id for parameters in mark}) == len(mark)
