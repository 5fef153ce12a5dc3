"""What a benchmark of an operator consists of: cases, precisions, and versions to compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.lib.measure import Steps
from benchmarks.lib.tables import operator_tables
from metalora._checks import did_you_mean


class NotOfferedError(Exception):
    """The version has no form for this case; the message says why."""


@dataclass(frozen=True)
class Precision:
    """Dtypes of a measurement, and the relative error ‖got - exact‖ / ‖exact‖ that they allow."""

    name: str
    parameters: torch.dtype
    activations: torch.dtype
    tolerance: float
    autocast: bool = False
    tf32: bool = False

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Sets how float32 products are computed."""
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if self.tf32 else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)

    def casting(self, device: str) -> contextlib.AbstractContextManager[object]:
        """The context of a forward pass."""
        if self.autocast:
            return torch.autocast(device, dtype=self.activations)
        return contextlib.nullcontext()


_BF16, _FP32, _FP64 = torch.bfloat16, torch.float32, torch.float64
PRECISIONS = {
    p.name: p
    for p in (
        Precision("autocast", _FP32, _BF16, 1e-2, autocast=True),
        Precision("tf32", _FP32, _FP32, 2e-3, tf32=True),
        Precision("bf16", _BF16, _BF16, 1e-2),
        Precision("fp32", _FP32, _FP32, 5e-5),
        Precision("fp64", _FP64, _FP64, 1e-12),
    )
}


@dataclass(frozen=True)
class Options:
    """How to measure, whatever the case.

    Attributes:
        names: the versions to measure.
        frozen: no gradients of the shared weights.
        timer: of `measure.side_by_side`; None is the device's own.
    """

    names: tuple[str, ...]
    device: str = "cpu"
    frozen: bool = False
    rounds: int = 25
    seconds_a_turn: float = 0.02
    timer: Any = None


@dataclass(frozen=True)
class Candidate:
    """A version of a case that has passed the correctness gate.

    Attributes:
        sets: the steps to time, over each set of tensors in rotation.
        error: the largest relative error that the gate found.
        scales: factors of the steps' times, where a call is a part of what the table shows.
        peak_bytes: what a call takes beside its inputs; None where it was not measured.
        padding: the share of padding in what is computed; None where nothing is padded.
        note: how the times were taken, where that is not the usual way.
        details: what else to record of it, as JSON can hold it.
    """

    sets: Sequence[Steps]
    error: float
    scales: Mapping[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    padding: float | None = None
    note: str = ""
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One measurement of one public operator.

    Attributes:
        operator: its name, or ``linear.`` or ``shallow.`` and its name.
        group: the cases that are chosen together.
        central: at most one of its sizes is not the one its group is built around.
        most_rounds: at most so many rounds, whatever `Options` says.
        once: calls take seconds, so that each is made once in either of two runs.
    """

    operator: str
    group: str
    name: str
    central: bool = field(default=True, kw_only=True)
    most_rounds: int = field(default=1000, kw_only=True)
    once: bool = field(default=False, kw_only=True)

    def offered(self, names: Sequence[str]) -> list[str]:
        """The versions among ``names`` that this case has."""
        return list(names)

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        """What makes the candidate of a version.

        It raises NotOfferedError where there is none, and `gate.GateError` where it is wrong.
        """
        raise NotImplementedError

    def shrunk(self) -> Case:
        """A tiny case like it, to try the code on."""
        raise NotImplementedError

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        """More to record of the case: the route taken, or ``work``, as (unit, scale, amounts)."""
        return {}


@dataclass(frozen=True)
class Benchmark:
    """All that one command measures.

    Attributes:
        name: of the module and of the files it writes.
        title: of its tables.
        cases: in the order of the tables.
        versions: groups of versions; the first is the default.
        floor: the version whose time all others are relative to; always measured.
        precisions: the default.
        groups: by device, the default group of cases.
        can_freeze: whether ``--frozen`` has a meaning.
        own_precisions: whether the versions have precisions of their own, and ``--precisions``
            has no meaning.
        page: makes the page of tables from what is in the .json file.
    """

    name: str
    title: str
    cases: tuple[Case, ...]
    versions: Mapping[str, Sequence[str]]
    floor: str
    precisions: tuple[str, ...] = ("fp32",)
    groups: Mapping[str, str] = field(default_factory=lambda: {"cpu": "cpu", "cuda": "cuda"})
    goals: tuple[Case, ...] = ()
    can_freeze: bool = False
    own_precisions: bool = False
    page: Callable[[Mapping[str, Any]], str] = operator_tables

    def select(self, words: Sequence[str]) -> list[Case]:
        """The cases that these words name, in their order, each once.

        ``a`` is the central cases of group a, ``a/all`` every one of them, ``goal`` those with a
        goal; anything else is a case's full name.

        Raises:
            ValueError: for a word that names nothing.
        """
        known: dict[str, list[Case]] = {case.name: [case] for case in self.cases}
        for group in dict.fromkeys(case.group for case in self.cases):
            known[f"{group}/all"] = [c for c in self.cases if c.group == group]
            known[group] = [c for c in known[f"{group}/all"] if c.central]
        if self.goals:
            known["goal"] = list(self.goals)
        return list(dict.fromkeys(c for word in words for c in _named("case", word, known)))

    def select_versions(self, words: Sequence[str]) -> tuple[str, ...]:
        """The floor, and the versions or groups of versions that these words name.

        Raises:
            ValueError: for a word that names nothing.
        """
        known = {n: [n] for names in self.versions.values() for n in names}
        known |= {group: list(names) for group, names in self.versions.items()}
        found = [name for word in words for name in _named("baseline", word, known)]
        return tuple(dict.fromkeys([self.floor, *found]))


def _named(kind: str, word: str, known: Mapping[str, list[Any]]) -> list[Any]:
    if word not in known:
        hint = did_you_mean(word, known)
        raise ValueError(f"no {kind} and no group of {kind}s is called {word!r}{hint}")
    return known[word]
