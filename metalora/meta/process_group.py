"""Joining the processes that torchrun started, also after it has started them again."""

from __future__ import annotations

import datetime
import importlib
import os

import torch
import torch.distributed as dist

from metalora._checks import first_line
from metalora.meta.distribution import ProcessGroupError


def init_process_group(
    backend: str | None = None, *, timeout: datetime.timedelta | None = None
) -> None:
    """Joins the processes that torchrun started; does nothing without torchrun.

    As `torch.distributed.init_process_group`, which may fail after ``torchrun --max-restarts`` has
    started the processes again: torchrun keeps the store through which they find each other, and
    with it the addresses of those that have ended. Here every start has keys of its own. Several
    machines must have restarted as often as each other.

    Args:
        backend: None takes gloo, and with GPUs NCCL for their tensors; each process then has the
            GPU of its number on its machine.
        timeout: after which an exchange fails; None takes torch's.

    Raises:
        ProcessGroupError: if the processes cannot reach each other.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return
    if backend is None:
        backend = "gloo"
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            backend = "cpu:gloo,cuda:nccl"
    # Default arguments there hold the group of the moment of its import (by the first optimiser, if
    # not here), and so its threads beyond destroy_process_group, to abort the process as it ends.
    importlib.import_module("torch.distributed.nn.functional")
    from torch.distributed.distributed_c10d import PrefixStore  # a torch without these may lack it
    from torch.distributed.rendezvous import rendezvous

    try:
        limit = dist.default_pg_timeout if timeout is None else timeout
        store, rank, size = next(rendezvous("env://", timeout=limit))
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"restart {restart}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise ProcessGroupError(
            f"init_process_group: process {os.environ['RANK']} cannot join the others at {where} "
            f"({first_line(error)}); if another program uses the port, choose another with "
            "torchrun --master-port, or take --standalone"
        ) from error
