"""The machine code of the kernels has the instructions that they were written for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import kernel_resources as gate
from tests.shim import build

pytestmark = pytest.mark.exhaustive

COPIES, STORES = "LDGSTS.E.BYPASS.128", "STG.E.128"
WANTED = {
    "merge_lora": ["LDG.E.128", STORES, "HMMA.1688.F32.TF32"],
    "merge_lora_backward": [COPIES, STORES, "HMMA.1688.F32.TF32"],
    "token_rows": [COPIES, STORES, "HMMA.16816.F32", "HMMA.16816.F32.BF16"],
}


def disassembler() -> str | None:
    """cuobjdump of the PATH, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if own.exists():
            return str(own)
    return shutil.which("cuobjdump")


def instructions(source: Path, folder: Path, architecture: str) -> Counter[str]:
    nvcc, why = gate.find_nvcc()
    program = disassembler()
    if nvcc is None or program is None:
        pytest.skip(f"no nvcc ({why}) or no cuobjdump")
    target = folder / "kernel.o"
    flags = [*gate.load_setup().NVCC_FLAGS, f"-arch={architecture}", "-c", str(source)]
    subprocess.run([nvcc, *flags, "-o", target], check=True, capture_output=True)
    dumped = subprocess.run([program, "--dump-sass", target], check=True, capture_output=True)
    return Counter(re.findall(r"\*/ +(?:@!?\w+ )?([A-Z][\w.]*)", dumped.stdout.decode()))


@pytest.mark.parametrize("name", WANTED)
def test_accesses_are_wide_and_products_are_of_the_tensor_cores(name: str, tmp_path: Path) -> None:
    found = instructions(build.CUDA / f"{name}.cu", tmp_path, "sm_90")
    assert all(found[wanted] for wanted in WANTED[name]), sorted(found)
    assert not found["LDL"] and not found["STL"]
