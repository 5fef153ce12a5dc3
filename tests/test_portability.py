"""One build of the CPU library runs on every CPU of its architecture."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from metalora import _library

ROOT = Path(__file__).resolve().parents[1]
# Functions that are called only where the CPU has the instructions that they are compiled for.
CHOSEN = re.compile(r"\bavx2::|\bavx512\w*::|_avx2\b|_avx2\(|\[clone \.arch_x86_64_v3\]")
# AVX and what is newer, in its encoding, and the newer instructions on general registers.
NEWER = re.compile(
    r"^v\w+ .*%[xyz]mm|^(?:shlx|shrx|sarx|rorx|mulx|pdep|pext|bzhi|andn|blsr|blsi)\b"
)
CROSS = "aarch64-linux-gnu-g++"


def functions_with_newer_instructions(listing: str) -> set[str]:
    """Names of the functions in a listing of objdump that a CPU without AVX cannot run."""
    found, name = set(), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            name = line[line.index("<") + 1 : -2]
        elif NEWER.match(line.rpartition("\t")[2]):
            found.add(name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="for the instruction sets of x86-64")
@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
def test_newer_instructions_stay_where_the_choice_leads(native: None) -> None:
    """Of an inline function compiled for several sets, the linker keeps one for all its callers."""
    library = _library._built("_C")
    assert library is not None
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = functions_with_newer_instructions(listing)
    assert any("avx512" in name for name in found)
    assert any("avx2" in name for name in found)
    assert {name for name in found if not CHOSEN.search(name)} == set()


def test_a_planted_instruction_is_found() -> None:
    listing = """
0000000000001000 <f(float*)>:
    1000:\tmovups (%rdi),%xmm0
    1004:\tverr   %ax
    1008:\tvaddps %xmm0,%xmm0,%xmm0
0000000000001010 <g()>:
    1010:\tandnps %xmm0,%xmm0
0000000000001020 <h()>:
    1020:\tshlx   %rax,%rbx,%rcx
"""
    assert functions_with_newer_instructions(listing) == {"f(float*)", "h()"}


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which(CROSS) is None, reason=f"{CROSS} is not installed")
def test_the_cpu_kernels_compile_for_aarch64(tmp_path: Path) -> None:
    flags = "-std=c++20 -O1 -ffp-contract=fast -fopenmp-simd -fvisibility=hidden -Wall -Werror"
    command = [CROSS, *flags.split(), "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    command += [argument for path in include_paths() for argument in ("-isystem", path)]
    for source in sorted((ROOT / "csrc" / "cpu").rglob("*.cpp")):
        compiled = subprocess.run(
            [*command, "-c", str(source), "-o", str(tmp_path / "object.o")],
            capture_output=True,
            text=True,
        )
        assert compiled.returncode == 0, compiled.stderr
