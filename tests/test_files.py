"""Files are there whole or not at all."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from metalora import _files
from metalora._files import partial_beside, remove_partials, replacing

ROOT = Path(__file__).resolve().parents[1]


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_file_is_replaced_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    for text in (b"one", b"two"):
        with replacing(path) as file:
            file.write(text)
            assert not path.exists() or path.read_bytes() == b"one"
        assert path.read_bytes() == text
        assert names(path.parent) == ["file"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_after_an_error_all_is_as_before(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def half() -> None:
        with replacing(path) as file:
            file.write(b"new")
            raise error

    with pytest.raises(error):
        half()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_what_cannot_take_the_place_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"), replacing(tmp_path / "folder") as file:
        file.write(b"new")
    assert names(tmp_path) == ["folder"]


def test_the_file_is_on_the_disk_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, fsync = [], os.fsync
    path = tmp_path / "file"

    def look(handle: int) -> None:
        kind = "folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file"  # noqa: PTH112
        seen.append((kind, path.exists()))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", look)
    with replacing(path) as file:
        file.write(b"new")
    assert seen == [("file", False), ("folder", True)]


LARGE = """
import sys
from pathlib import Path
from metalora._files import replacing
with replacing(Path(sys.argv[1])) as file:
    print("open", flush=True)
    while True:
        file.write(bytes(1000))
"""


def start_writing(path: Path, largest: int) -> subprocess.Popen[str]:
    """A process that writes without end, to a file of at most ``largest`` bytes."""
    return subprocess.Popen(
        [sys.executable, "-c", LARGE, str(path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest)),
    )


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = start_writing(path, 2**30)
    assert child.stdout is not None and child.stdout.readline() == "open\n"
    os.kill(child.pid, signal.SIGSTOP)
    try:
        assert len(names(tmp_path)) == 2
        remove_partials(path)
        assert len(names(tmp_path)) == 2  # it may go on
    finally:
        child.kill()
        child.communicate()
    assert len(names(tmp_path)) == 2 and path.read_bytes() == b"old"
    with replacing(path) as file:
        file.write(b"new")
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"new"


@pytest.mark.slow
def test_a_limit_on_files_is_an_oserror_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    child = start_writing(path, 2**20)
    _, errors = child.communicate(timeout=240)
    assert child.returncode == 1 and "OSError: [Errno 27] File too large" in errors
    assert names(tmp_path) == ["file"] and path.read_bytes() == b"old"


def test_other_machines_and_other_files_are_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    monkeypatch.setattr(os, "getpid", lambda: child.pid)  # of a process that has ended
    ours, folder, of_another = (partial_beside(p) for p in (path, path, tmp_path / "file2"))
    monkeypatch.setattr(_files, "_HERE", "elsewhere")
    theirs = partial_beside(path)
    monkeypatch.undo()
    folder.mkdir()
    (folder / "part").write_bytes(b"part")
    strange = [tmp_path / f".file.{_files._HERE}.{rest}.partial" for rest in ("", "x.1", "9" * 30)]
    for other in (ours, of_another, theirs, *strange):
        other.write_bytes(b"part")
    remove_partials(path)
    assert names(tmp_path) == sorted(p.name for p in (of_another, theirs, *strange))


def test_two_threads_do_not_share_a_partial_file(tmp_path: Path) -> None:
    path, texts = tmp_path / "file", [bytes([n]) * 100_000 for n in range(4)]
    start = threading.Barrier(4)

    def write(text: bytes) -> None:
        start.wait()
        with replacing(path) as file:
            for part in range(0, len(text), 1000):
                file.write(text[part : part + 1000])
                time.sleep(0)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in texts and names(tmp_path) == ["file"]
