"""What the command lines of all benchmarks share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments.lib.cli import option
from experiments.synthetic.settings import DEVICES, check_device
from metalora._library import gpu_problem


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a benchmark that makes tables."""

    device: str = option("cpu", choices=DEVICES, help="where to measure")
    write: Path | None = option(None, help="folder to write the tables to")
    name: str | None = option(None, help="of the files written (default: <benchmark>_<device>)")
    smoke: bool = option(False, help="tiny shapes and a few samples")

    def __post_init__(self) -> None:
        check_folder("write", self.write)
        check_device(self.device)
        check_kernels(self.device)
        if self.name is not None and Path(self.name).name != self.name:
            raise ValueError(f"argument --name: must be a file name, got {self.name!r}")


def check_kernels(device: str) -> None:
    """Raises ValueError where a GPU would be measured without our kernels: PyTorch under our name.

    A library that does not run on this GPU counts as none.
    """
    problem = gpu_problem(torch.cuda.current_device()) if device == "cuda" else None
    if problem:
        raise ValueError(f"argument --device: cuda measures nothing of metalora's here: {problem}")


def check_folder(name: str, folder: Path | None) -> None:
    """Raises ValueError if a folder cannot be written to; called before anything is measured."""
    if folder is None:
        return
    there = folder
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"argument --{name}: {there} is not a folder")
    if not os.access(there, os.W_OK):
        raise ValueError(f"argument --{name}: {there} cannot be written to; choose another folder")


def program(module: str) -> str:
    """How a benchmark is called."""
    return f"python -m benchmarks.{module}"


def repeat(module: str, argv: Sequence[str] | None) -> str:
    """The command that measures the same again, wherever the tables go."""
    kept = list(sys.argv[1:] if argv is None else argv)
    if "--write" in kept:
        at = kept.index("--write")
        kept[at : at + 2] = ["--write", "benchmarks/results"]
    return shlex.join([*program(module).split(), *kept])


def with_lists(command: str, lists: Mapping[str, Sequence[str]]) -> str:
    """A command with other values of some options, and without ``--resume``."""
    kept, leave_out = [], False
    for word in shlex.split(command):
        if word.startswith("--"):
            leave_out = word.partition("=")[0].removeprefix("--") in ("resume", *lists)
        if not leave_out:
            kept.append(word)
    for name, values in lists.items():
        kept += [f"--{name}", *values]
    return shlex.join(kept)
