"""Trainings killed at random moments end in the bits of one that was never stopped."""

from __future__ import annotations

import pytest

from tests.meta.kills import KINDS, killed_training
from tests.processes import HAS_GLOO

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "parallel"), KINDS)
def test_a_killed_training_ends_in_the_same_bits(processes: int, parallel: str | None) -> None:
    if processes > 1 and not HAS_GLOO:
        pytest.skip("needs torch.distributed with gloo")
    # Long enough not to end before the last kill, on a fast machine too.
    kills, _, equal = killed_training(processes, parallel, kills=3, seed=5, epochs_per_kill=16)
    assert kills == 3
    assert equal
