"""torchrun starts a user's script again after one of its processes was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.meta import killed_once
from tests.meta.test_distribution import close
from tests.processes import free_port, needs_gloo

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@needs_gloo
def test_a_script_goes_on_after_a_restart(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
    command += ["--nproc-per-node", "2", "--max-restarts", "1"]
    command += ["-m", "tests.meta.killed_once", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "exitcode: -9" in done.stderr  # it was killed
    (tmp_path / "whole").mkdir()
    killed_once.main(tmp_path / "whole")
    found = load_file(tmp_path / "end.safetensors")
    for name, value in load_file(tmp_path / "whole" / "end.safetensors").items():
        close(found[name], value, name)
