"""`python -m metalora`: what is installed, what is built and loaded, and why not where not."""

from __future__ import annotations

import platform
import sys

import numpy
import torch

import metalora
from metalora import ops
from metalora._library import build_info, cpu_status, cuda_status, native_available


def main() -> None:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none visible"
    built = build_info()
    lines = [
        ("metalora", metalora.__version__),
        ("python", f"{platform.python_version()} on {sys.platform} {platform.machine()}"),
        ("torch", f"{torch.__version__} ({torch.get_num_threads()} threads)"),
        ("numpy", numpy.__version__),
        ("GPU", gpu),
        ("CPU library", cpu_status),
        ("CUDA library", cuda_status),
    ]
    if built:
        lines.append(("built with", f"torch {built['torch']}, {built['compiler']}"))
        if built["torch"] != torch.__version__:
            lines.append(("", "another torch than now: fine, the library uses its stable ABI"))
    for name, text in lines:
        print(f"{name + ':' if name else '':<14}{text}")
    print("\noperator       cpu          cuda")
    for name in sorted(ops.__all__):
        if name[0].islower() and name not in ("choose_route", "lora_linear_route"):
            print(f"{name:<22} {_backend(name, 'cpu'):<12} {_backend(name, 'cuda')}")


def _backend(name: str, device_type: str) -> str:
    if not native_available(device_type):
        return "reference"
    if device_type == "cuda":
        return "native" if name == "dropout_mask" else "reference"
    return "native"


if __name__ == "__main__":
    main()
