"""Dialogues as tasks: one persona cluster is one task, the largest come first."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.language import parlai, records
from experiments.language.candidates import Candidates
from experiments.language.dialogues import (
    CATCH_ALL,
    EXACT,
    PARTIAL,
    SILENCE,
    UNMATCHED,
    DataError,
    Dialogue,
)
from experiments.language.personas import PersonaMap, plain

# What is looked for in a data folder, the first that is there; a name without an ending is a
# folder of the datasets library, such as DatasetDict.save_to_disk makes one for each split.
RETRAIN_FILES = (
    "train_self_original.txt",
    "train_self_original_no_cands.txt",
    "train.jsonl",
    "train",
)
TEST_FILES = (
    "valid_self_original.txt",
    "valid_both_sides.jsonl",
    "valid_self_original_no_cands.txt",
    "valid.jsonl",
    "validation",
)


@dataclass(frozen=True)
class Task:
    """One persona cluster.

    Attributes:
        cluster: its number in the persona map.
        train: dialogues to train on, in the file's order.
        held_out: the last ones.
    """

    cluster: int
    train: tuple[Dialogue, ...]
    held_out: tuple[Dialogue, ...]


@dataclass(frozen=True)
class FileReport:
    """What was found in one file.

    Attributes:
        sha256: checksums by file name: the file's and its persona map's.
        exact, partial, catch_all: dialogues whose persona lies in a cluster, in part in a
            cluster, and in the catch-all cluster, which is left out whatever the match.
        unmatched: where each dialogue begins whose persona matches no cluster, and the persona.
        clusters: how many clusters have dialogues that can be used.
        distractors_drawn: whether the file came without candidate lists.
    """

    path: Path
    sha256: dict[str, str]
    exact: int
    partial: int
    catch_all: int
    unmatched: tuple[tuple[str, tuple[str, ...]], ...]
    clusters: int
    distractors_drawn: bool

    def counts(self) -> dict[str, int]:
        """Numbers of dialogues, for a log or a manifest."""
        return {
            "exact": self.exact,
            "partial": self.partial,
            "catch_all": self.catch_all,
            "unmatched": len(self.unmatched),
        }


@dataclass(frozen=True)
class Corpus:
    """Tasks to retrain on and tasks to test on.

    Attributes:
        files: reports on the retraining and the test file; one report if they are the same.
        other_sides: dialogues left out of the retraining tasks because a test task has them, or a
            retraining task holds them out, as a rule from the other side.
    """

    retraining: tuple[Task, ...]
    testing: tuple[Task, ...]
    files: tuple[FileReport, ...]
    other_sides: int


def load(
    root: Path,
    *,
    retrain_file: str | None = None,
    test_file: str | None = None,
    tasks: int = 10,
    test_tasks: int = 10,
    held_out: int = 3,
    test_held_out: int = 2,
    strict: bool = True,
    candidates: int = 20,
    seed: int = 0,
    turns: int | None = None,
) -> Corpus:
    """Reads the dialogues and makes the largest persona clusters the tasks.

    With two files, the retraining tasks are the largest of one, the test tasks the largest of the
    other. With one file they are disjoint clusters of it: the ``tasks`` largest for retraining,
    the ``test_tasks`` next ones for testing. Among clusters of one size the smaller number comes
    first. A file may have a dialogue twice, from both speakers' sides: what a test task has from
    either side is left out of the retraining tasks, and what one of these holds out is not trained
    on in another.

    Args:
        root: a folder, in which the first of ``RETRAIN_FILES`` and of ``TEST_FILES`` is taken (one
            of them is enough), or one file.
        retrain_file, test_file: names in ``root`` to take instead. Either is in ParlAI's format
            (.txt, with ``<first word of its name>_persona_map.json`` beside it), JSON lines
            (.jsonl), or a folder of the datasets library.
        held_out, test_held_out: how many of a task's last dialogues are held out.
        strict: leave out personas that match their cluster only in part.
        candidates: how many each turn has; distractors are drawn where the file has no lists.
        seed: of the distractors and the order of the candidates.
        turns: keep only so many of each dialogue, the first.

    Raises:
        DataError: no data, damaged data (with file and line), or fewer tasks, or smaller ones,
            than asked for.
    """
    retrain_path, test_path = _find(Path(root), retrain_file, test_file)
    retrain = _Source(retrain_path, candidates, seed)
    test = retrain if test_path == retrain_path else _Source(test_path, candidates, seed)
    chosen = retrain.clusters(strict)
    if test is retrain:
        _check_enough(retrain, chosen, tasks + test_tasks)
        chosen, test_chosen = chosen[:tasks], chosen[tasks : tasks + test_tasks]
    else:
        test_chosen = test.clusters(strict)
        _check_enough(retrain, chosen, tasks)
        _check_enough(test, test_chosen, test_tasks)
        chosen, test_chosen = chosen[:tasks], test_chosen[:test_tasks]
    tested = {_conversation(d) for _, dialogues in test_chosen for d in dialogues}
    kept = [(c, [d for d in ds if _conversation(d) not in tested]) for c, ds in chosen]
    validated = {_conversation(d) for _, ds in kept for d in ds[len(ds) - held_out :]}
    kept = [
        (c, [d for d in ds[:end] if _conversation(d) not in validated] + ds[end:])
        for c, ds in kept
        for end in [len(ds) - held_out]
    ]
    sources = [retrain] if test is retrain else [retrain, test]
    return Corpus(
        tuple(retrain.task(c, ds, held_out, turns) for c, ds in kept),
        tuple(test.task(c, ds, test_held_out, turns) for c, ds in test_chosen),
        tuple(source.report(strict) for source in sources),
        sum(len(ds) for _, ds in chosen) - sum(len(ds) for _, ds in kept),
    )


class _Source:
    """One file's dialogues."""

    def __init__(self, path: Path, candidates: int, seed: int) -> None:
        self.path = path
        self.sha256 = {path.name: _sha256(path)}
        if path.is_dir():
            self.dialogues = records.read_dataset(path, candidates)
        elif path.suffix == ".jsonl":
            self.dialogues = records.read_json_lines(path, candidates)
        else:
            self.dialogues = self._match(parlai.read(path, candidates))
        if not self.dialogues:
            raise DataError(f"{path} holds no dialogues; fetch it again")
        self.candidates = Candidates(self.dialogues, candidates, seed, path)

    def _match(self, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
        path = self.path.with_name(f"{self.path.stem.split('_')[0]}_persona_map.json")
        personas = PersonaMap(path)
        self.sha256[path.name] = _sha256(path)
        matched = []
        for dialogue in dialogues:
            cluster, match = personas.match(dialogue.persona)
            matched.append(dataclasses.replace(dialogue, cluster=cluster, match=match))
        return matched

    def clusters(self, strict: bool) -> list[tuple[int, list[Dialogue]]]:
        """The clusters' dialogues, largest cluster first."""
        members: dict[int, list[Dialogue]] = defaultdict(list)
        for dialogue in self.dialogues:
            if dialogue.cluster not in (None, CATCH_ALL) and (
                dialogue.match == EXACT or not strict
            ):
                members[dialogue.cluster].append(dialogue)
        return sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))

    def task(
        self, cluster: int, dialogues: Sequence[Dialogue], held_out: int, turns: int | None
    ) -> Task:
        if len(dialogues) <= held_out:
            raise DataError(
                f"{self.path}: cluster {cluster} has {len(dialogues)} dialogues that can be used, "
                f"{held_out} of them to hold out, which leaves none to train on; "
                "ask for fewer tasks or hold out fewer"
            )
        cut = [dataclasses.replace(d, turns=d.turns[:turns]) for d in dialogues]
        completed = tuple(self.candidates.complete(d) for d in cut)
        kept = len(completed) - held_out
        return Task(cluster, completed[:kept], completed[kept:])

    def report(self, strict: bool) -> FileReport:
        in_clusters = [d for d in self.dialogues if d.cluster != CATCH_ALL]
        unmatched = [d for d in in_clusters if d.match == UNMATCHED]
        return FileReport(
            self.path,
            self.sha256,
            exact=sum(d.match == EXACT for d in in_clusters),
            partial=sum(d.match == PARTIAL for d in in_clusters),
            catch_all=len(self.dialogues) - len(in_clusters),
            unmatched=tuple((d.where, d.persona) for d in unmatched),
            clusters=len(self.clusters(strict)),
            distractors_drawn=self.candidates.drawn,
        )


def _find(root: Path, retrain_file: str | None, test_file: str | None) -> tuple[Path, Path]:
    """The file to retrain on and the one to test on."""
    if not root.exists():
        raise DataError(f"{root} does not exist; give the folder of the dialogues with --data")
    if root.is_file() or _is_dialogues(root):
        if retrain_file or test_file:
            raise DataError(
                f"{root} is one file; give the folder it is in with --data to name files in it"
            )
        only = _named(root.parent, root.name)
        return only, only
    retrain = _named(root, retrain_file) if retrain_file else _first(root, RETRAIN_FILES)
    test = _named(root, test_file) if test_file else _first(root, TEST_FILES)
    found = [path for path in (retrain, test) if path is not None]
    if not found:
        wanted = ", ".join((*RETRAIN_FILES, *TEST_FILES))
        raise DataError(
            f"no dialogues in {root}: none of {wanted} is there; "
            "give another folder with --data, or name the files with --retrain-file and --test-file"
        )
    return found[0], found[-1]


def _named(root: Path, name: str) -> Path:
    path = root / name
    if not _is_dialogues(path):
        raise DataError(
            f"{path} is no file of dialogues: wanted a .txt or .jsonl file or a folder of the "
            "datasets library"
        )
    return path


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if _is_dialogues(root / name)), None)


def _is_dialogues(path: Path) -> bool:
    if path.is_dir():
        return (path / records.DATASET_STATE).is_file()
    return path.is_file() and path.suffix in (".txt", ".jsonl")


def _check_enough(source: _Source, clusters: Sequence[object], wanted: int) -> None:
    if len(clusters) < wanted:
        strangers = [d.where for d in source.dialogues if d.match == UNMATCHED]
        unmatched = f" ({len(strangers)} match none, first {strangers[0]})" if strangers else ""
        raise DataError(
            f"{source.path}: wanted {wanted} tasks, but only {len(clusters)} persona clusters have "
            f"dialogues that can be used{unmatched}; ask for fewer --tasks or --test-tasks"
        )


def _conversation(dialogue: Dialogue) -> tuple[str, ...]:
    """What is said in a dialogue, the same from either side.

    The partner's side opens with silence and lacks the last response of the responder's side.
    """
    turns = dialogue.turns
    said = [plain(text) for turn in turns for text in (turn.utterance, turn.response)]
    return tuple(said[1:] if turns[0].utterance == SILENCE else said[:-1])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()
