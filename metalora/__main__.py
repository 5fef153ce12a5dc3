"""`python -m metalora`: what is built and loaded and, for anything missing, the reason."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence

import numpy
import torch

import metalora
from metalora._library import INSTRUCTIONS, native_available, variable
from metalora._matmul import matmul_library
from metalora.ops._native import operators

USAGE = "usage: python -m metalora    (without arguments; --help shows this line)"


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit code, 2 if there are arguments."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments in (["-h"], ["--help"]):
        print(f"{USAGE}\nSays what is installed, and what is built and loaded.")
        return 0
    if arguments:
        print(f"error: unexpected argument {arguments[0]!r}; {USAGE}", file=sys.stderr)
        return 2
    info = metalora.build_info()
    lines = {
        "metalora": metalora.__version__,
        "python": f"{platform.python_version()} on {sys.platform} {platform.machine()}",
        "torch": f"{torch.__version__} ({torch.get_num_threads()} threads)",
        "numpy": numpy.__version__,
        "GPU": torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible",
        "CPU library": info["cpu"],
        "CUDA library": info["cuda"],
    }
    if "architectures" in info:
        lines["built for"] = f"compute capability {info['architectures']}"
    if "compiler" in info:
        lines["built with"] = f"torch {info['torch']}, {info['compiler']}"
        lines["instructions"] = f"{info['instructions']} ({reason_for_instructions(info)})"
        lines["fp32 matmul"] = "{} ({})".format(*matmul_library())
    for name, text in lines.items():
        print(f"{name + ':':<14}{text}")
    print(f"\n{'operator':<26}{'on CPU':<12}on CUDA")
    for name in operators:
        if name.endswith("_backward"):
            continue
        print(f"{name:<26}{backend(name, 'cpu'):<12}{backend(name, 'cuda')}")
    return 0


def reason_for_instructions(info: Mapping[str, str]) -> str:
    """Why the CPU kernels use the instruction set that they use."""
    used, best = info["instructions"], info["best instructions"]
    if used == best:
        return "the best that this CPU has"
    switch = INSTRUCTIONS if variable(INSTRUCTIONS) else "ATEN_CPU_CAPABILITY"
    return f"{switch}={os.environ[switch]}; this CPU has {best}"


def backend(operator: str, device_type: str) -> str:
    """What an operator runs on for tensors of this device: "native" or "reference"."""
    if not native_available(device_type):
        return "reference"
    registered = torch._C._dispatch_has_kernel_for_dispatch_key(
        f"metalora::{operator}", device_type.upper()
    )
    return "native" if registered else "reference"


if __name__ == "__main__":
    sys.exit(main())
