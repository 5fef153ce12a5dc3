"""A whole training step as a case of a benchmark, and the tables of such cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from benchmarks.lib.cases import Candidate, Case, NotOfferedError, Options, Precision
from benchmarks.lib.measure import peak_bytes
from benchmarks.lib.step_parts import PARTS, step_shares
from benchmarks.lib.step_versions import (
    AUTHORS,
    PLAIN,
    Gate,
    Setting,
    Version,
    in_precision,
    versions,
)
from benchmarks.lib.tables import markdown, page, seconds
from benchmarks.lib.task_by_task import FASTER
from experiments.lib.tables import three_digits
from metalora.meta import Batch


@dataclass(frozen=True)
class StepCase(Case):
    """Training steps of a setting, each of them on a round.

    Attributes:
        title: what it is, for the tables.
        new_setting: makes the setting on a ``device``; a tiny one with ``tiny=True``.
        versions: those that this case has, see `step_versions.versions`.
        samples: how often each round is timed in either of the two runs.
        profiled: the versions of which it is recorded where the time goes.
    """

    title: str
    new_setting: Callable[..., Setting]
    versions: tuple[str, ...]
    samples: int = 1
    profiled: tuple[str, ...] = ()
    once: bool = field(default=True, kw_only=True)

    def offered(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name in self.versions]

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        setting = self.new_setting(device=options.device)
        makers, gate, batches = versions(setting), Gate(setting), setting.batches

        def make(name: str) -> Candidate:
            version = makers[name]()
            if version.precision == FASTER and setting.device != "cpu":
                raise NotOfferedError("the faster products are those of a CPU")
            details: dict[str, Any] = {"precision": version.precision}
            error = gate(name, version)
            version.round(setting.few)  # makes the optimiser's state
            peak = peak_bytes(partial(version.round, batches[0]), setting.device)
            if name in self.profiled and setting.device == "cpu":
                details["parts"] = step_shares(partial(version.round, batches[0]))
            steps = [{"round": partial(_step, version, batch)} for batch in batches]
            return Candidate(
                steps * self.samples,
                error,
                peak_bytes=peak,
                padding=_padding(version, setting),
                details=details,
            )

        return make

    def shrunk(self) -> StepCase:
        """The same with tiny models and data, to try the code on."""
        return replace(self, new_setting=partial(self.new_setting, tiny=True), samples=1)

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        unit, amount = self.new_setting(device=device).work
        work = {"unit": unit, "scale": 1, "amounts": {"round": amount}}
        return {"title": self.title, "work": work}


def _step(version: Version, batch: Batch) -> None:
    version.round(batch)
    version.model.zero_grad()  # many versions are in memory at once


def _padding(version: Version, setting: Setting) -> float | None:
    """The share of padding tokens in what the model is called with; None where there are none."""
    calls = [part for batch in setting.batches for part in version.inputs(batch)]
    if not isinstance(calls[0], Mapping):
        return None
    tokens = setting.work[1] * len(setting.batches)
    return 1 - tokens / sum(inputs["input_ids"].numel() for inputs in calls)


HEADER = [
    "version",
    "precision",
    "step (quartiles)",
    "rate",
    "× authors'",
    "time / plain",
    "padding",
    "peak memory, MiB",
    "error",
]


def step_tables(record: Mapping[str, Any]) -> str:
    """The page of whole steps: a table for every case, and where the time goes."""
    parts = [
        "Medians and quartiles. × authors': the rate relative to the authors' schedule in fp32. "
        "Time / plain: the time relative to a step of the plain model, without adapters and with "
        "all tasks pooled, in the same precision. Peak memory: the most that a step takes beside "
        "weights, gradients and the optimiser's state. Error: the largest relative error of the "
        "loss or of any task's gradient against float64."
    ]
    for one in record["rows"]:
        if rows := _rows(one):
            parts += [f"### {one['case']}: {one['title']}", markdown(HEADER, rows)]
        else:  # there was no time for it, not even to look at it
            parts.append(f"### {one['case']}")
        others = [f"- {n}: {r['status']}" for n, r in one["rows"].items() if "total" not in r]
        parts += ["\n".join(others)] * bool(others)
    spent = [
        [one["case"], name, row["precision"], *(_percent(row["parts"][p]) for p in PARTS)]
        for one in record["rows"]
        for name, row in one["rows"].items()
        if "parts" in row and "total" in row
    ]
    if spent:
        header = ["case", "version", "precision", *PARTS]
        parts += ["### Where the time of a step goes", markdown(header, spent)]
    return page(record, *parts)


def _rows(one: Mapping[str, Any]) -> list[list[str]]:
    timed = {name: row for name, row in one["rows"].items() if "total" in row}
    medians = {name: row["total"]["median"] for name, row in timed.items()}
    found = []
    for name, row in timed.items():
        total, median = row["total"], medians[name]
        plain = medians.get(in_precision(PLAIN, row["precision"]))
        rate = sum(one["work"]["amounts"].values()) / median
        found.append(
            [
                name,
                row["precision"],
                f"{seconds(median)} ({seconds(total['low'])} to {seconds(total['high'])})",
                f"{three_digits(rate)} {one['work']['unit']}",
                f"{medians[AUTHORS] / median:.2f}" if AUTHORS in medians else "",
                "" if plain is None else f"{median / plain:.2f}",
                "" if row["padding"] is None else _percent(row["padding"]),
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['error']:.0e}",
            ]
        )
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
