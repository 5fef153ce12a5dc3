"""Experiments on several processes, as torchrun starts them: one writes, all train together.

    torchrun --nproc-per-node 2 -m experiments.vision --data digits --out runs/digits

Every process runs the same command. The first one writes the run folder and prints; the others do
the same trainings beside it, and keep what they would write to themselves.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from experiments.lib.errors import RunError
from experiments.lib.manifest import MANIFEST
from experiments.lib.runs import RunFolder
from metalora import meta

# Of an exchange. The first process may load data and draw figures meanwhile.
TIMEOUT = datetime.timedelta(minutes=30)


def launched() -> bool:
    """Returns whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Returns the number of this process; 0 writes and prints."""
    return int(os.environ["RANK"]) if launched() else 0


def count() -> int:
    """Returns how many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def restarts() -> int:
    """Returns how often torchrun has started the processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def no_bar() -> bool | None:
    """Returns the ``disable`` of tqdm: only the first process shows a bar, in a terminal."""
    return True if rank() > 0 else None


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Joins the processes that torchrun started; without torchrun it does nothing.

    Raises:
        RunError: the processes cannot reach each other.
    """
    if not launched():
        yield
        return
    try:
        meta.init_process_group(timeout=TIMEOUT)
    except meta.ProcessGroupError as error:
        raise RunError(str(error).removeprefix("init_process_group: ")) from None
    with contextlib.ExitStack() as stack:
        if rank() > 0:
            quiet = stack.enter_context(Path(os.devnull).open("w"))
            stack.enter_context(contextlib.redirect_stdout(quiet))
        yield
    dist.destroy_process_group()


def first_alone(prepare: Callable[[], Any]) -> Any:
    """Returns what ``prepare`` returns, which the first process calls before the others do.

    So only one downloads data or fills a cache.
    """
    if not launched():
        return prepare()
    if rank() > 0:
        dist.barrier()
    found = prepare()
    if rank() == 0:
        dist.barrier()
    return found


def open_folder(create: Callable[..., RunFolder], out: Path | None, resume: bool) -> RunFolder:
    """Returns the run folder: in the first process open for writing, in others to follow.

    After torchrun has started the processes again, a run that is there goes on.

    Args:
        create: `RunFolder.create` but for its keyword ``resume``.
        out, resume: the settings.

    Raises:
        RunError: see `RunFolder.create`; in all processes.
    """
    if not launched():
        return create(resume=resume)
    if restarts() > 0 and out is not None and (out / MANIFEST).exists():
        resume = True
    folder: RunFolder | None = None
    told = [""]
    error: BaseException | None = None
    if rank() == 0:
        try:
            folder = create(resume=resume)
            told = [json.dumps([str(folder.folder), folder.manifest, sorted(folder.units_done)])]
        except BaseException as raised:
            error, told = raised, [json.dumps([str(raised)])]
    told = [_broadcast(told[0])]
    if error is not None:
        raise error
    if folder is not None:
        return folder
    found = json.loads(told[0])
    if len(found) == 1:
        raise RunError(found[0])
    return FollowedFolder(Path(found[0]), found[1], set(found[2]))


def _broadcast(text: str) -> str:
    """Returns the first process's text, in all."""
    data = torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    data = data if rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return bytes(data.tolist()).decode()


class FollowedFolder(RunFolder):
    """A run folder that another process writes: knows which units are done, and writes nothing."""

    def __init__(self, folder: Path, manifest: dict[str, Any], done: set[str]):
        self.folder, self.manifest, self.units_done = folder, manifest, done

    def add_data(self, name: str, sha256: str) -> None:
        """Does nothing, as do all methods that would write."""

    def note(self, **facts: Any) -> None: ...

    def log(self, **record: Any) -> None: ...

    def add_rows(self, rows: Sequence[Mapping[str, Any]]) -> None: ...

    def expect_columns(self, columns: Sequence[str]) -> None: ...

    def write_json(self, name: str, value: Any) -> None: ...

    def finish(self, status: str = "completed") -> None: ...

    def close(self) -> None: ...

    def mark_done(self, unit: str) -> None:
        """Remembers the unit."""
        self.units_done.add(unit)

    def __enter__(self) -> FollowedFolder:
        return self

    def __exit__(self, *error: Any) -> None: ...
