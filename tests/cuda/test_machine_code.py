"""The machine code of the kernels has the instructions that they were written for."""

from __future__ import annotations

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
    "token_rows": [
        *(COPIES, STORES),
        *("HMMA.16816.F32", "HMMA.16816.F32.BF16", "HMMA.1688.F32.TF32", "FFMA"),
    ],
}


def instructions(source: Path, folder: Path, architecture: str) -> Counter[str]:
    nvcc, why = gate.find_nvcc()
    if nvcc is None or gate.find_disassembler() is None:
        pytest.skip(f"no nvcc ({why}) or no cuobjdump")
    target = folder / "kernel.o"
    flags = [*gate.load_setup().NVCC_FLAGS, f"-arch={architecture}", "-c", str(source)]
    subprocess.run([nvcc, *flags, "-o", target], check=True, capture_output=True)
    return sum(gate.machine_code(target).values(), Counter())


@pytest.mark.parametrize("name", WANTED)
def test_accesses_are_wide_and_products_are_of_the_tensor_cores(name: str, tmp_path: Path) -> None:
    found = instructions(build.CUDA / f"{name}.cu", tmp_path, "sm_90")
    assert all(found[wanted] for wanted in WANTED[name]), sorted(found)
    assert not found["LDL"] and not found["STL"]
