"""Trainings killed at random moments end in the bits of one that was never stopped."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.meta.kills import KINDS, killed_training

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("processes", "parallel"), KINDS)
def test_a_killed_training_ends_in_the_same_bits(processes: int, parallel: str | None) -> None:
    if processes > 1 and not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("needs torch.distributed with gloo")
    kills, _, equal = killed_training(processes, parallel, kills=3, seed=5)
    assert kills == 3
    assert equal
