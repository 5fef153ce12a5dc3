"""The text of tasks: a folder for each, and what is set aside for measurements.

A task's files are ``*.txt``, each a document, and ``*.jsonl``, each line of which is a document:
``{"prompt": ..., "response": ...}``, of which the response alone is learned, or ``{"text": ...}``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.lib.cli import flag_of
from experiments.lib.errors import DataError, RunError

KB = 1000
CHARACTER = 4  # bytes of one in UTF-8, at most: what a cut between characters may lack
MADE_UP = ("acb", "bca", "cab", "dac", "dca")  # the tasks of a smoke run without data
GROUPS = ("tasks", "validation_tasks", "test_tasks")  # and the options that name them


@dataclass(frozen=True)
class Document:
    """A piece of text.

    Attributes:
        where: its file and, in a file of several, its line.
        text: what is to be learned; in bytes, as nothing says that a file is UTF-8.
        prompt: what stands before it.
    """

    where: str
    text: bytes
    prompt: bytes = b""


@dataclass(frozen=True)
class Task:
    """A task's documents.

    Attributes:
        name: its folder's.
        train, held_out: documents to learn from, and to measure with.
        empty: how many files or lines had no text.
    """

    name: str
    train: tuple[Document, ...]
    held_out: tuple[Document, ...]
    empty: int


@dataclass(frozen=True)
class Corpus:
    """The tasks of a run.

    Attributes:
        retraining: the tasks to retrain on.
        validation: the unseen tasks by which rates are chosen.
        test: the unseen tasks that are reported on.
        sha256: checksum of all their documents.
    """

    retraining: tuple[Task, ...]
    validation: tuple[Task, ...]
    test: tuple[Task, ...]
    sha256: str = field(default="")

    @property
    def every(self) -> tuple[Task, ...]:
        """Returns the tasks of all groups."""
        return (*self.retraining, *self.validation, *self.test)


def load(
    root: Path,
    *,
    tasks: Sequence[str],
    validation_tasks: Sequence[str],
    test_tasks: Sequence[str],
    train: int,
    few: int,
    held_out: int,
    seed: int,
) -> Corpus:
    """Reads the tasks.

    Args:
        root: the folder with a folder for each task.
        tasks: names of the retraining tasks; none: all folders that are not named otherwise.
        validation_tasks, test_tasks: names of the unseen tasks.
        train: bytes of text of a retraining task to learn from at most.
        few: bytes of text that an unseen task must have to learn from; it is given twice as much,
            if it has that, to draw from.
        held_out: bytes of text of each task to measure with.
        seed: of the order of the documents.

    Raises:
        DataError: a folder is missing, or its files have no text, too little of it, or are damaged.
        RunError: a task is named twice.
    """
    if not root.is_dir():
        raise DataError(f"--data: {root} is no folder; give one with a folder of text per task")
    named = (*tasks, *validation_tasks, *test_tasks)
    for name in named:
        if named.count(name) > 1:
            raise RunError(f"{name!r} is named by two of {', '.join(map(flag_of, GROUPS))}")
        if not (root / name).is_dir():
            known = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())[:40])
            raise DataError(f"--data: {root} has no folder {name!r}; there are {known or 'none'}")
    if not tasks:
        folders = sorted(path.name for path in root.iterdir() if path.is_dir())
        tasks = [name for name in folders if name not in named]
    if len(tasks) < 2:
        raise RunError(f"--tasks: there must be two retraining tasks at least, got {len(tasks)}")
    digest = hashlib.sha256()

    def read(names: Sequence[str], least: int, most: int) -> tuple[Task, ...]:
        found = tuple(_task(root / name, least, most, held_out, seed) for name in names)
        for task in found:
            for document in (*task.train, *task.held_out):
                digest.update(b"%d %d " % (len(document.prompt), len(document.text)))
                digest.update(document.prompt + document.text)
        return found

    retraining = read(tasks, 1, train)
    validation, test = (read(names, few, 2 * few) for names in (validation_tasks, test_tasks))
    return Corpus(retraining, validation, test, digest.hexdigest())


def documents(folder: Path) -> tuple[list[Document], int]:
    """Reads a task's documents, and counts the empty files and lines that it leaves out.

    Raises:
        DataError: there are no files, or a line is no JSON object with the keys that are wanted.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".jsonl"))
    if not files:
        raise DataError(f"{folder}: no text; wanted *.txt or *.jsonl")
    found: list[Document] = []
    empty = 0
    for path in files:
        data = path.read_bytes()
        if path.suffix == ".txt":
            of_file = [Document(str(path), data)]
        else:
            lines = enumerate(data.splitlines(), 1)
            of_file = [_of_line(f"{path}, line {n}", line) for n, line in lines if line.strip()]
            empty += not of_file
        kept = [document for document in of_file if document.text.strip()]
        empty += len(of_file) - len(kept)
        found += kept
    if not found:
        raise DataError(f"{folder}: all of its {len(files)} files are empty")
    return found, empty


@contextlib.contextmanager
def data_folder(data: Path | None, smoke: bool) -> Iterator[Path]:
    """Returns the folder of the tasks; for a smoke run without data it makes some up.

    Raises:
        ValueError: no data were given.
    """
    if data is not None:
        yield data
        return
    if not smoke:
        raise ValueError("argument --data: give the folder that has a folder of text per task")
    with tempfile.TemporaryDirectory() as folder:
        for name in MADE_UP:
            (Path(folder) / name).mkdir()
            for number in range(6):
                words = random.Random(f"{name} {number}").choices([name, name * 2, "o"], k=200)
                (Path(folder) / name / f"{number}.txt").write_text(" ".join(words))
        yield Path(folder)


def _task(folder: Path, least: int, most: int, held_out: int, seed: int) -> Task:
    found, empty = documents(folder)
    random.Random(seed).shuffle(found)
    if len(found) == 1 and not found[0].prompt:  # nothing else than to cut it
        (only,) = found
        first = _shortened(only, held_out)
        rest = replace(only, text=only.text[len(first.text) :])
        found = [first, *([rest] if rest.text else [])]
    measured = _taken(found, held_out)
    train = _taken(found[len(measured) :], most)
    kept, have, total = (sum(len(d.text) for d in part) for part in (measured, train, found))
    if kept <= held_out - CHARACTER or have <= max(0, least - CHARACTER):
        raise DataError(
            f"{folder}: too little text: {total / KB:.1f} kB in {len(found)} documents, wanted "
            f"{held_out / KB:g} kB to measure with and {least / KB:g} kB in other "
            "documents to learn from; leave the task out, or adapt to less with --amounts"
        )
    return Task(folder.name, tuple(train), tuple(measured), empty)


def _taken(found: Sequence[Document], wanted: int) -> list[Document]:
    """Returns the first documents, the last of them cut, that have so many bytes to learn."""
    taken = []
    for document in found:
        if wanted < CHARACTER:
            break
        taken.append(_shortened(document, wanted))
        wanted -= len(document.text)
    return taken


def _shortened(document: Document, size: int) -> Document:
    """Returns the beginning of a document's text, cut between characters if it is UTF-8."""
    if len(document.text) <= size or document.prompt:
        return document
    cut = document.text[:size]
    with contextlib.suppress(UnicodeDecodeError):
        document.text.decode()
        cut = cut.decode(errors="ignore").encode()
    return replace(document, text=cut)


def _of_line(where: str, line: bytes) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError(f"{where}: no JSON; wanted an object with prompt and response") from None
    keys = set(record) if isinstance(record, dict) else set()
    text = record.get("response", record.get("text")) if keys else None
    prompt = record.get("prompt", "") if keys else None
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise DataError(
            f"{where}: wanted text for 'prompt' and 'response', or for 'text', got "
            f"{sorted(keys) or type(record).__name__}"
        )
    text, prompt = (part.encode(errors="surrogatepass") for part in (text, prompt))
    return Document(where, text, prompt)
