"""Covering sets: tests of several parameters without every combination of their values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Pair = tuple[tuple[int, int], tuple[int, int]]  # twice: which parameter, which of its values


def every_pair(**values: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrizes a test so that any two values of two parameters meet in one of its cases.

    Nearly all mistakes depend on one or two parameters; the cases are about as many as the two
    longest parameters have combinations.
    """
    lists = [list(of_one) for of_one in values.values()]
    rows = [
        pytest.param(*row, id="-".join(map(_name, row)))
        for row in (
            [of_one[i] for of_one, i in zip(lists, row, strict=True)]
            for row in covering_rows([len(of_one) for of_one in lists])
        )
    ]
    return pytest.mark.parametrize(list(values), rows)


def covering_rows(counts: Sequence[int]) -> list[tuple[int, ...]]:
    """Rows of indices, one below each count, in which every pair of two columns' indices occurs.

    Greedy: a row begins with a pair that is missing; each other column takes the index that brings
    in most of the missing pairs.
    """
    missing: dict[Pair, None] = {  # a set that keeps its order
        ((a, i), (b, j)): None
        for a, b in combinations(range(len(counts)), 2)
        for i, j in product(range(counts[a]), range(counts[b]))
    }
    rows = []
    while missing:
        row = dict(next(iter(missing)))
        for column in (c for c in range(len(counts)) if c not in row):
            gains = [
                sum(tuple(sorted(((column, i), other))) in missing for other in row.items())
                for i in range(counts[column])
            ]
            row[column] = gains.index(max(gains))
        for pair in combinations(sorted(row.items()), 2):
            missing.pop(pair, None)
        rows.append(tuple(row[c] for c in range(len(counts))))
    return sorted(rows)


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
