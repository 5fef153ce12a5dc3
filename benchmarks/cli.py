"""The arguments that all benchmarks of operators share."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    known = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known.add_argument("--device", type=_device, default="cpu", metavar="{cpu,cuda}")
    known.add_argument("--smoke", action="store_true", help="tiny shapes and a few samples")
    known.add_argument("--write", type=Path, metavar="DIR", help="write the tables here")
    return known


def command(module: str, argv: Sequence[str]) -> str:
    """What measures the same again, wherever the tables go."""
    kept = list(argv)
    if "--write" in kept:
        at = kept.index("--write")
        kept[at : at + 2] = ["--write", "benchmarks/results"]
    return shlex.join(["python", "-m", f"benchmarks.{module}", *kept])


def _device(text: str) -> str:
    if text not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu or cuda, got {text!r}")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no GPU here; use --device cpu")
    return text
