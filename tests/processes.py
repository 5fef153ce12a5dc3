"""Child processes: that tests interrupt, or that train together."""

from __future__ import annotations

import atexit
import datetime
import multiprocessing
import pickle
import signal
import socket
import subprocess
import tempfile
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="needs torch.distributed with gloo")


def start_interruptible(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a process that Ctrl-C ends, even where the test run itself ignores SIGINT.

    A shell's background jobs ignore it, and so would their children.
    """
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **options,
    )


def free_port() -> int:
    """A port that no process listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_processes(
    function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 60
) -> tuple[list[multiprocessing.process.BaseProcess], Any]:
    """Starts ``function(*arguments)`` in processes of one gloo group, and returns them.

    They are forked from a server that has imported torch once.

    Args:
        function: of a module that can be imported.
        world_size: how many processes.
        arguments: of the function.
        seconds: after which an exchange fails.

    Returns:
        The processes, and a queue of (rank, error, pickled value); "" is no error.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metalora.meta", "torch._dynamo", "tests.processes"])
    queue = context.Queue()
    store = Path(tempfile.gettempdir(), f"metalora-{uuid.uuid4().hex}")  # not a port, which
    atexit.register(store.unlink, missing_ok=True)  # another process could take meanwhile
    processes = [
        context.Process(
            target=_join, args=(function, rank, world_size, store, seconds, queue, arguments)
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return list(processes), queue


def run_processes(
    function: Callable[..., Any], world_size: int, *arguments: Any, seconds: float = 60
) -> list[Any]:
    """What ``function(*arguments)`` returns in each process of a gloo group, by rank.

    Raises:
        AssertionError: with the traceback, if it fails in one.
    """
    processes, queue = start_processes(function, world_size, *arguments, seconds=seconds)
    found: dict[int, Any] = {}
    for _ in processes:
        rank, error, value = queue.get(timeout=5 * seconds)
        assert not error, f"process {rank}: {error}"
        found[rank] = pickle.loads(value)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(world_size)]


def _join(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    store: Path,
    seconds: float,
    queue: Any,
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=seconds),
        )
        value, error = function(*arguments), ""
    except BaseException:
        value, error = None, traceback.format_exc()
    queue.put((rank, error, pickle.dumps(value)))  # with the tensors' numbers, not their memory
    if not error:
        dist.destroy_process_group()
