"""The command line that all benchmarks share."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from experiments.lib import cli
from experiments.lib.cli import option
from experiments.synthetic.settings import DEVICES, check_device

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class TableSettings:
    """Settings of a benchmark that makes tables."""

    write: Path | None = option(None, help="folder to write the tables to")

    def __post_init__(self) -> None:
        check_folder("write", self.write)


@dataclass(frozen=True)
class DeviceSettings(TableSettings):
    """Settings of a benchmark that runs on a CPU or a GPU."""

    device: str = option("cpu", choices=DEVICES, help="where to measure")
    smoke: bool = option(False, help="tiny shapes and a few samples")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device(self.device)


@dataclass(frozen=True)
class NamedSettings(DeviceSettings):
    """Settings of a benchmark whose tables can be called otherwise."""

    name: str | None = option(None, help="of the files written (default: <benchmark>_<device>)")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name is not None and Path(self.name).name != self.name:
            raise ValueError(f"argument --name: must be a file name, got {self.name!r}")


def parse(
    settings: type[Settings], argv: Sequence[str] | None, module: str, description: str | None
) -> Settings:
    """Reads the command line of ``python -m benchmarks.<module>``."""
    return cli.parse(
        settings, argv, prog=f"python -m benchmarks.{module}", description=description or ""
    )


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


def command(module: str, argv: Sequence[str] | None) -> str:
    """What measures the same again, wherever the tables go."""
    kept = list(sys.argv[1:] if argv is None else argv)
    if "--write" in kept:
        at = kept.index("--write")
        kept[at : at + 2] = ["--write", "benchmarks/results"]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *kept])
