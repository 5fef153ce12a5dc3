"""The trainers' portable kernels give what those for the instructions of this CPU give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalora import linear, shallow
from metalora._library import native_available
from tests.shallow.problems import start

PORTABLE = "ATEN_CPU_CAPABILITY", "default"  # read once in a process, by PyTorch and by metalora
CODE = """
import sys, torch
from tests.test_instruction_sets import results
torch.save(results(), sys.argv[1])
"""


def results() -> list[Tensor]:
    """Weights of linear trainings, then losses of shallow ones, of sizes with and without rest."""
    generator = torch.Generator().manual_seed(0)
    found = []
    f32, f64 = torch.float32, torch.float64
    for dim, dtype in ((5, f64), (10, f64), (21, f64), (10, f32)):
        truths = linear.sample_problem(3, dim, 2, generator=generator, dtype=dtype).truths
        stats = linear.sample_statistics(truths, 50, generator=generator)
        trained = linear.lora_ml(stats, 2, outer_steps=20, inner_lr=0.001, generator=generator)
        found.append(trained.weight)
    for dim, dtype in ((5, f64), (12, f64), (10, f32)):
        s = start(3, 50, dim, 2, dtype=dtype)
        found.append(shallow.lora_ml(s.x, s.y, s.network, s.adapters, epochs=100).losses)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="the native library is not built")
@pytest.mark.skipif(os.environ.get(PORTABLE[0]) == PORTABLE[1], reason="this process is portable")
def test_every_instruction_set_gives_the_same_results(tmp_path: Path) -> None:
    file = tmp_path / "portable.pt"
    subprocess.run(
        [sys.executable, "-c", CODE, str(file)],
        env={**os.environ, PORTABLE[0]: PORTABLE[1]},
        cwd=Path(__file__).resolve().parents[1],
        check=True,
        timeout=120,
    )
    for portable, best in zip(torch.load(file), results(), strict=True):
        tolerance = 1e-12 if portable.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(portable, best, rtol=tolerance, atol=tolerance)
