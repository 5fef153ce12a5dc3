"""Whole trainings of the two small models: versions that run any number of steps of the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.lib.cases import Candidate, Case, Options, Precision
from benchmarks.lib.gate import check_parts

GATE_STEPS, TOLERANCE = 20, {torch.float64: 1e-10, torch.float32: 1e-4}


@dataclass(frozen=True)
class Version:
    """One way to train.

    Attributes:
        run: takes a number of steps; returns what to compare, one row a training.
        steps: of a timed call; None is a whole training.
        trainings: at once in a call.
    """

    run: Callable[[int], Tensor]
    steps: int | None = None
    trainings: int = 1


@dataclass(frozen=True)
class TrainingCase(Case):
    """Trainings of one method, all at once; times are of one training of ``steps`` steps.

    ``versions`` makes them all with the same numbers, whatever the dtype. The version "reference"
    in float64 is what all others must equal.
    """

    trainings: int
    steps: int

    @property
    def method(self) -> str:
        return self.operator.partition(".")[2]

    def versions(self, dtype: torch.dtype, device: str) -> Mapping[str, Version]:
        raise NotImplementedError

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        dtype, device = precision.parameters, options.device
        timed = self.versions(dtype, device)
        double = timed if dtype == torch.float64 else self.versions(torch.float64, device)
        exact = double["reference"].run(GATE_STEPS)

        def make(name: str) -> Candidate:
            for kind, versions in {torch.float64: double, dtype: timed}.items():
                found = versions[name].run(GATE_STEPS)
                error = check_parts(name, found, exact[: len(found)], TOLERANCE[kind])
            one = timed[name]
            steps = min(one.steps or self.steps, self.steps)
            scale = self.steps / (steps * one.trainings)
            note = "" if steps == self.steps else f"{steps} steps timed"
            return Candidate(
                [{"train": lambda: one.run(steps)}], error, {"train": scale}, note=note
            )

        return make

    def about(self, precision: Precision, device: str) -> dict[str, Any]:
        return {"work": {"unit": "trainings/s", "amounts": {"train": 1}, "scale": 1}}


def by_reference(run: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
    """The same call of `metalora.linear` or `metalora.shallow`, on plain PyTorch."""

    def plain(steps: int) -> Tensor:
        with mock.patch("metalora.ops._trainings.usable", return_value=False):
            return run(steps)

    return plain
