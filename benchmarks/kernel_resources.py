"""The registers, memory and instructions of each CUDA kernel; one that spills is an error.

python -m benchmarks.kernel_resources            # compare with benchmarks/results
python -m benchmarks.kernel_resources --write    # write the table there

Needs nvcc and cuobjdump, and no GPU. Compilers differ in registers: a difference is printed but is
no error. A kernel whose instructions have become more by over a tenth is one: its loops are
unrolled, so that they grow with what is done for an element.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

from benchmarks.lib.cli import program
from benchmarks.lib.tables import markdown, read_json, write_json
from experiments.lib import cli
from experiments.lib.cli import main_guard, option
from experiments.lib.errors import RunError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "kernel_resources"

# Those of the build, and the newer ones that run its PTX.
ARCHITECTURES = ("80", "90", "100", "120")
MOST_GROWTH = 1.1  # of a kernel's instructions

# An SM of compute capability 8.0 or 9.0: its parts, and of each the registers, the warps, and the
# unit in which a warp gets registers.
_PARTS, _REGISTERS, _WARPS, _REGISTER_UNIT = 4, 16384, 16, 256


@dataclass(frozen=True)
class Resources:
    """One kernel on one architecture; sizes in bytes, without shared memory asked for at launch."""

    kernel: str
    architecture: str
    registers: int
    shared: int
    stack: int
    spills: int
    instructions: int

    @property
    def warps(self) -> int:
        """How many of an SM's 64 warps the registers allow."""
        per_warp = -(-self.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
        return _PARTS * min(_WARPS, _REGISTERS // per_warp)


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metalora_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def find_nvcc() -> tuple[Path | None, str]:
    """The compiler that the build would take, or None, and the reason."""
    import torch

    if torch.version.cuda is None:
        return None, "this torch has no CUDA"
    toolkit, why = load_setup().find_toolkit(torch.version.cuda)
    return (toolkit / "bin" / "nvcc", why) if toolkit else (None, why)


def find_disassembler() -> str | None:
    """cuobjdump of the PATH, or the one that comes with triton."""
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin:
        own = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if own.exists():
            return str(own)
    return shutil.which("cuobjdump")


def machine_code(file: Path) -> dict[tuple[str, str], Counter[str]]:
    """How often each instruction stands in an object file, by kernel (a symbol) and architecture.

    Raises:
        RunError: there is no cuobjdump.
    """
    cuobjdump = find_disassembler()
    if cuobjdump is None:
        raise RunError("kernel_resources needs cuobjdump, of the CUDA toolkit or of triton")
    command = [cuobjdump, "--dump-sass", str(file)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for part in re.split(r"^\s*code for ", text, flags=re.MULTILINE)[1:]:
        architecture = part.split()[0]
        for function in re.split(r"Function : ", part)[1:]:
            counts = Counter(re.findall(r"\*/ +(?:@!?\w+ )?([A-Z][\w.]*)", function))
            del counts["NOP"]  # they fill up the last line
            found[function.split()[0], architecture] = counts
    return found


def kernels() -> list[Path]:
    """The CUDA sources of the build."""
    return sorted((ROOT / "csrc" / "cuda").rglob("*.cu"))


def digest(sources: Sequence[Path]) -> str:
    """A digest of sources and what they include, without comments and line breaks, and of flags."""
    found, parts = list(sources), [*load_setup().NVCC_FLAGS]
    for path in found:  # which grows by what its own files include
        text = path.read_text(encoding="utf-8")
        parts += re.sub(r"//.*", "", text).split()
        named = [path.parent / name for name in re.findall(r'^#include "(.+)"', text, re.MULTILINE)]
        found += [p for p in map(Path.resolve, named) if p.exists() and p not in found]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:24]


def measure(nvcc: Path, sources: Sequence[Path]) -> list[Resources]:
    """Compiles the sources with the build's flags; kernels sorted by name, then architecture.

    Raises:
        subprocess.CalledProcessError: if one does not compile.
    """
    targets = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in ARCHITECTURES]
    flags = [*load_setup().NVCC_FLAGS, *targets, "-Xptxas=-v", "-c"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

        def compiled(source: Path) -> list[Resources]:
            target = Path(folder) / f"{source.stem}.o"
            command = [nvcc, *flags, source, "-o", target]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.stderr.write(done.stderr)
                done.check_returncode()
            found = parse(done.stderr, machine_code(target))
            return [replace(r, kernel=f"{source.stem}: {r.kernel}") for r in found]

        found = [r for part in pool.map(compiled, sources) for r in part]
    return sorted(found, key=lambda r: (r.kernel, r.architecture))


def parse(log: str, code: Mapping[tuple[str, str], Counter[str]]) -> list[Resources]:
    """The kernels in the output of ``ptxas -v``, with what `machine_code` found."""
    found = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        entry = re.match(r"'(\w+)' for '(\w+)'", part)
        stack = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", part)
        used = re.search(r"Used (\d+) registers", part)
        if not (entry and stack and used):
            raise ValueError(f"what ptxas says of a kernel was not understood: {part[:300]!r}")
        shared = re.search(r"(\d+) bytes smem", part)
        found.append(
            Resources(
                kernel=readable(entry[1]),
                architecture=entry[2],
                registers=int(used[1]),
                shared=int(shared[1]) if shared else 0,
                stack=int(stack[1]),
                spills=int(stack[2]) + int(stack[3]),
                instructions=code[entry[1], entry[2]].total(),
            )
        )
    return found


def readable(symbol: str) -> str:
    """A kernel's name and template arguments."""
    filt = shutil.which("c++filt")
    if filt is None:
        return symbol
    text = subprocess.run([filt, symbol], capture_output=True, text=True, check=True).stdout.strip()
    text = text.removeprefix("void ").replace("(anonymous namespace)::", "")
    text = re.sub(r"\b(metalora|cuda)::", "", text)
    text = text.replace("__nv_bfloat16", "bf16").replace("__half", "f16")
    depth = 0
    for i, character in enumerate(text):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return text[:i]
    return text


def compare(
    measured: Sequence[Resources], recorded: Sequence[Resources]
) -> tuple[list[str], list[str]]:
    """(errors, notes on differences that are no errors)."""
    errors, notes = [], []
    before = {(r.kernel, r.architecture): r for r in recorded}
    for r in measured:
        place = f"{r.kernel} on {r.architecture}"
        if r.spills:
            errors.append(f"{place} spills {r.spills} bytes of registers into memory")
        old = before.pop((r.kernel, r.architecture), None)
        if old is None:
            errors.append(f"{place} is not in the table; run with --write")
        elif r.instructions > MOST_GROWTH * old.instructions:
            errors.append(
                f"{place} has {r.instructions} instructions, recorded are {old.instructions}; if "
                "they are worth it, run with --write"
            )
        elif (old.registers, old.shared, old.stack) != (r.registers, r.shared, r.stack):
            notes.append(
                f"{place}: {r.registers} registers, {r.shared} bytes shared, {r.stack} of stack; "
                f"recorded are {old.registers}, {old.shared}, {old.stack}"
            )
    errors += [f"{kernel} on {a} is in the table but no longer built" for kernel, a in before]
    return errors, notes


def read_recorded(folder: Path) -> list[Resources]:
    path = folder / f"{NAME}.json"
    if not path.exists():
        return []
    return [Resources(**row) for row in read_json(path)["kernels"]]


def read_digest(folder: Path) -> str:
    """The digest of the sources of which the table is."""
    return str(read_json(folder / f"{NAME}.json")["sources"])


def write(folder: Path, measured: Sequence[Resources], compiler: str, sources: str) -> None:
    command = f"{program(NAME)} --write"
    kernels = [asdict(r) for r in measured]
    record = {"command": command, "compiler": compiler, "sources": sources, "kernels": kernels}
    write_json(folder / f"{NAME}.json", record)
    header = ["kernel", "architecture", "registers", "warps", "shared, bytes", "stack, bytes"]
    rows = [
        [
            f"`{r.kernel}`",
            r.architecture,
            *map(str, (r.registers, r.warps, r.shared, r.stack, r.spills, r.instructions)),
        ]
        for r in measured
    ]
    text = (
        "# Registers and memory of each CUDA kernel\n\n"
        f"`{command}`, {compiler}. Shared memory is what kernels declare, without what launches "
        "ask for; warps: how many of an SM's 64 fit, given the registers; instructions: those of "
        "the machine code, in which loops are unrolled.\n\n"
        f"{markdown([*header, 'spills', 'instructions'], rows)}\n"
    )
    (folder / f"{NAME}.md").write_text(text, encoding="utf-8")


def compiler_version(nvcc: Path) -> str:
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release [\d.]+, V([\d.]+)", text)
    return f"nvcc {match[1]}" if match else "nvcc of an unknown version"


@dataclass(frozen=True)
class Settings:
    """Settings of this command."""

    write: bool = option(False, help="write the table to benchmarks/results")


@main_guard
def main(argv: Sequence[str] | None = None) -> int:
    """Prints the differences from the table; 1 if one of them is an error, else 0."""
    settings = cli.parse(Settings, argv, prog=program(NAME), description=__doc__ or "")
    nvcc, why = find_nvcc()
    if nvcc is None:
        raise RunError(f"kernel_resources needs nvcc: {why}")
    measured = measure(nvcc, kernels())
    if settings.write:
        write(RESULTS, measured, compiler_version(nvcc), digest(kernels()))
    errors, notes = compare(measured, read_recorded(RESULTS))
    for line in [*notes, *errors]:
        print(line)
    print(f"{len(measured)} kernels, {len(errors)} errors")
    return 1 if errors else 0


if __name__ == "__main__":
    main()
