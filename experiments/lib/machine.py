"""The machine: what it is, and how to use it well."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from experiments.lib.errors import RunError
from metalora._checks import did_you_mean
from metalora._matmul import cpu_fields


def description() -> dict[str, Any]:
    """Returns what a manifest says about the machine."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def cpu_name(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the processor's name as the system reports it.

    A name without a number, such as that of a virtual machine's, is followed by family and model.
    """
    found = cpu_fields(cpuinfo)
    name = found.get("model name") or platform.processor() or platform.machine()
    if not any(letter.isdigit() for letter in name) and "cpu family" in found:
        name += f" (family {found['cpu family']}, model {found.get('model')})"
    return name


def _memory_gib() -> float | None:
    with contextlib.suppress(AttributeError, ValueError, OSError):
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return None


def choose_device(name: str) -> torch.device:
    """Returns the device called ``name``; "auto" is the accelerator, or the CPU without one.

    Raises:
        RunError: there is no such device, or it computes nothing, as torch's "meta".
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: a process for each GPU
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of names that it will drop
            device = torch.device(name)
            torch.ones(1, device=device).add(1).item()
    except Exception:  # each of torch's backends fails in its own way
        known_names = ("auto", "cpu", "cuda")
        is_known = name.partition(":")[0] in known_names
        hint = "" if is_known else did_you_mean(name, known_names)
        hint = hint or "; try auto or cpu"
        raise RunError(f"--device {name} cannot be used here{hint}") from None
    return device


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Has torch use one thread, for tensors whose arithmetic is shorter than waking a second one.

    On a busy machine two threads, which wait for each other at every step, take up to ten times
    as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Has glibc keep freed memory instead of returning it to the system.

    A step frees and asks again for the same blocks. Getting them from the system anew costs a page
    fault per 4 kB, 440 000 in a step of a Mixer with 256 images of CIFAR-10, and half of the time.

    The price is fragmentation: PyTorch wants its blocks aligned to 64 bytes, glibc looks for 96
    bytes more to align in, so a freed block seldom serves for another of its size. Resident memory
    came to twice what a step holds at once, and to more with every other size of batch. Have the
    model take large batches in passes, for the sum stays small then.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h
    with contextlib.suppress(AttributeError, OSError):  # another C library: nothing to tune
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
