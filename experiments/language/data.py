"""Dialogues as tasks: one persona cluster is one task; the largest clusters come first."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.language.dialogues import (
    EXACT,
    PARTIAL,
    SILENCE,
    UNMATCHED,
    Dialogue,
    Turn,
    is_dialogues,
    plain,
    read,
)
from experiments.lib.errors import DataError

# The first of these that a data folder has is taken; a name without an ending is a folder of the
# datasets library, such as DatasetDict.save_to_disk makes for each split.
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
# Dialogues for a common start; those of train_subset are too few per persona to be tasks.
START_FILES = ("train_subset.jsonl", *RETRAIN_FILES)
CATCH_ALL = 0  # the cluster under which the persona maps file personas that are unlike each other
CLUSTERS, DIALOGUES, TURNS = 8, 10, 4  # of what `write_made_up` writes
THINGS = ("dogs", "cars", "books", "trains", "cakes", "songs", "boats", "films", "games", "plants")
ADJECTIVES = ("red", "old", "new", "big", "small")
QUESTIONS = ("do you like {} ?", "what about {} ?", "tell me about your {} .", "i have many {} .")
ANSWERS = ("i love {} .", "{} are my life .", "no , {} bore me .", "my mother has two {} .")


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
    """The findings in one file.

    Attributes:
        sha256: checksums by file name: the file's and its persona map's.
        counts: the number of dialogues whose persona lies in a cluster ("exact"), in part in a
            cluster ("partial"), in the catch-all cluster, which is left out whatever the match
            ("catch_all"), and in none ("unmatched").
        unmatched: where each dialogue begins that is left out as its persona matches no cluster.
        clusters: how many clusters have dialogues that can be used.
        distractors_drawn: whether the file came without candidate lists.
    """

    path: Path
    sha256: dict[str, str]
    counts: dict[str, int]
    unmatched: tuple[str, ...]
    clusters: int
    distractors_drawn: bool


@dataclass(frozen=True)
class Corpus:
    """Tasks to retrain on and tasks to test on.

    Attributes:
        files: reports on the retraining and the test file; one report if they are the same.
        other_sides: dialogues left out because a test task has them, or because they are held out,
            usually from the other side.
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
    first_test_task: int | None = None,
    held_out: int = 3,
    test_held_out: int = 2,
    per_turn: int = 20,
    seed: int = 0,
) -> Corpus:
    """Reads the dialogues and makes the largest persona clusters the tasks.

    With two files, the retraining tasks are the largest of one, the test tasks the largest of the
    other. With one file they are disjoint clusters of it: the ``tasks`` largest for retraining,
    the ``test_tasks`` next ones for testing. Among clusters of one size the smaller number comes
    first. ``first_test_task`` passes over more clusters than these.

    A file may have a dialogue twice, from both speakers' sides: what a test task has from either
    side is left out of the retraining tasks, what one of these holds out is not trained on in any
    of them, and what a test task holds out is not trained on in that task.

    Args:
        root: a folder, in which the first of ``RETRAIN_FILES`` and of ``TEST_FILES`` is taken (one
            of them is enough), or one file; `experiments.language.dialogues` says of which forms.
        retrain_file, test_file: names in ``root`` to take instead.
        first_test_task: how many larger clusters of its file precede the first test task; None
            means ``tasks`` with one file, and none with two.
        held_out, test_held_out: how many of a task's last dialogues are held out.
        per_turn: candidates of each turn; distractors are drawn where the file has no lists.
        seed: of the distractors and the order of the candidates.

    Raises:
        DataError: no data, damaged data (with file and line), fewer tasks, or smaller ones, than
            asked for, or test tasks that are retraining tasks too.
    """
    retrain_path, test_path = _find(Path(root), retrain_file, test_file)
    one_file = test_path == retrain_path
    first = (tasks if one_file else 0) if first_test_task is None else first_test_task
    if one_file and first < tasks:
        raise DataError(
            f"{test_path}: --first-test-task must be at least {tasks}, as its {tasks} largest "
            f"personas are the retraining tasks, got {first}"
        )
    retrain = _Source(retrain_path, per_turn, seed)
    test = retrain if one_file else _Source(test_path, per_turn, seed)
    test_chosen = test.largest(first + test_tasks)[first:]
    chosen = retrain.largest(tasks)
    tested = {_conversation(d) for _, dialogues in test_chosen for d in dialogues}
    retraining = [(c, [d for d in ds if _conversation(d) not in tested]) for c, ds in chosen]
    retraining = _without_other_sides(retraining, held_out)
    testing = [_without_other_sides([of_one], test_held_out)[0] for of_one in test_chosen]
    before, after = (*chosen, *test_chosen), (*retraining, *testing)
    return Corpus(
        tuple(retrain.task(c, ds, held_out) for c, ds in retraining),
        tuple(test.task(c, ds, test_held_out) for c, ds in testing),
        tuple(source.report() for source in dict.fromkeys([retrain, test])),
        sum(len(ds) for _, ds in before) - sum(len(ds) for _, ds in after),
    )


def _without_other_sides(
    clusters: Sequence[tuple[int, list[Dialogue]]], held_out: int
) -> list[tuple[int, list[Dialogue]]]:
    """Leaves out what one of the clusters holds out, from either side, of what they train on."""
    ends = [len(dialogues) - held_out for _, dialogues in clusters]
    kept_out = {
        _conversation(d)
        for (_, dialogues), end in zip(clusters, ends, strict=True)
        for d in dialogues[end:]
    }
    return [
        (c, [d for d in dialogues[:end] if _conversation(d) not in kept_out] + dialogues[end:])
        for (c, dialogues), end in zip(clusters, ends, strict=True)
    ]


def load_pooled(
    root: Path,
    *,
    file: str | None = None,
    held_out: int = 100,
    per_turn: int = 20,
    seed: int = 0,
) -> Corpus:
    """Reads all dialogues of a file as one task, whatever their personas; there is no test task.

    The dialogues held out are drawn by ``seed``. A dialogue that shares its persona with one of
    them, or is one of them from the other side, is left out of those to train on.

    Args:
        root: a folder, in which the first of ``START_FILES`` is taken, or one file.
        file: name in ``root`` to take instead.
        held_out, per_turn: see `load`.
        seed: also of the distractors and the order of the candidates.

    Raises:
        DataError: no data, damaged data (with file and line), or no dialogue is left to train on.
    """
    source = _Source(_find_one(Path(root), file), per_turn, seed)
    order = np.random.default_rng([seed, len(source.dialogues)]).permutation(len(source.dialogues))
    drawn = [source.dialogues[i] for i in order]
    kept, validated = drawn[:-held_out], drawn[-held_out:]
    others = fingerprints(validated)
    train = [d for d in kept if others.isdisjoint(fingerprints([d]))]
    if not train:
        raise DataError(
            f"{source.path} has {len(drawn)} dialogues, {held_out} of them to hold out, which "
            "leaves none of other personas to train on; give more dialogues or hold out fewer"
        )
    task = source.task(CATCH_ALL, [*train, *validated], held_out)
    report = dataclasses.replace(source.report(), unmatched=())  # these are used too
    return Corpus((task,), (), (report,), len(kept) - len(train))


def fingerprints(dialogues: Iterable[Dialogue]) -> set[str]:
    """Returns digests of what is said in each dialogue, the same from either side, and of personas.

    Spelling, as far as `experiments.language.dialogues.plain` removes it, does not count. A
    dialogue of one turn counts with its response, as its utterance alone says little.
    """
    found = set()
    for dialogue in dialogues:
        said = _conversation(dialogue)
        if len(said) < 3:
            said = tuple(
                plain(t) for turn in dialogue.turns for t in (turn.utterance, turn.response)
            )
        found.add(_digest("said", said))
        if dialogue.persona:
            found.add(_digest("persona", sorted(map(plain, dialogue.persona))))
    return found


def _digest(kind: str, texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([kind, *texts]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def data_folder(data: Path | None, smoke: bool) -> Iterator[Path]:
    """Gives the folder of the dialogues; for a smoke run without data, one with made-up ones.

    Raises:
        ValueError: no data were given.
    """
    if data is not None:
        yield data
    elif smoke:
        with tempfile.TemporaryDirectory() as made_up:
            write_made_up(Path(made_up))
            yield Path(made_up)
    else:
        raise ValueError(
            "argument --data: give the folder of the ConvAI2 dialogues; --smoke runs without"
        )


def write_made_up(folder: Path) -> None:
    """Writes dialogues for runs without data, always the same; an answer suits its question."""
    for seed, name in enumerate(("valid.jsonl", START_FILES[0])):
        draw = random.Random(seed)
        with (folder / name).open("w", encoding="utf-8") as file:
            for cluster in range(1, CLUSTERS + 1):
                for _ in range(DIALOGUES):
                    turns = []
                    for thing in draw.sample(THINGS, TURNS):
                        about = f"{draw.choice(ADJECTIVES)} {thing}"
                        question, answer = draw.choice(QUESTIONS), draw.choice(ANSWERS)
                        turns.append([question.format(about), answer.format(about)])
                    file.write(json.dumps({"cluster": cluster, "turns": turns}) + "\n")


class _Source:
    """One file's dialogues."""

    def __init__(self, path: Path, per_turn: int, seed: int) -> None:
        self.path = path
        self.dialogues, self.sha256 = read(path, per_turn)
        if not self.dialogues:
            raise DataError(f"{path} holds no dialogues; fetch it again")
        self.lists = _CandidateLists(self.dialogues, per_turn, seed, path)

    def largest(self, count: int) -> list[tuple[int, list[Dialogue]]]:
        """Returns the ``count`` largest clusters and their dialogues, largest first."""
        clusters = self._clusters()
        if len(clusters) < count:
            strangers = [d.where for d in self.dialogues if d.match == UNMATCHED]
            unmatched = f" ({len(strangers)} match none, first {strangers[0]})" if strangers else ""
            raise DataError(
                f"{self.path}: wanted {count} tasks, but only {len(clusters)} persona clusters "
                f"have dialogues that can be used{unmatched}; ask for fewer --tasks or --test-tasks"
            )
        return clusters[:count]

    def _clusters(self) -> list[tuple[int, list[Dialogue]]]:
        members: dict[int, list[Dialogue]] = defaultdict(list)
        for dialogue in self.dialogues:
            if dialogue.cluster not in (None, CATCH_ALL) and dialogue.match == EXACT:
                members[dialogue.cluster].append(dialogue)
        return sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))

    def task(self, cluster: int, dialogues: Sequence[Dialogue], held_out: int) -> Task:
        if len(dialogues) <= held_out:
            raise DataError(
                f"{self.path}: cluster {cluster} has {len(dialogues)} dialogues that can be used, "
                f"{held_out} of them to hold out, which leaves none to train on; "
                "ask for fewer tasks or hold out fewer"
            )
        completed = tuple(map(self.lists.complete, dialogues))
        kept = len(completed) - held_out
        return Task(cluster, completed[:kept], completed[kept:])

    def report(self) -> FileReport:
        in_clusters = [d for d in self.dialogues if d.cluster != CATCH_ALL]
        unmatched = [d for d in in_clusters if d.match == UNMATCHED]
        return FileReport(
            self.path,
            self.sha256,
            counts={
                "exact": sum(d.match == EXACT for d in in_clusters),
                "partial": sum(d.match == PARTIAL for d in in_clusters),
                "catch_all": len(self.dialogues) - len(in_clusters),
                "unmatched": len(unmatched),
            },
            unmatched=tuple(d.where for d in unmatched),
            clusters=len(self._clusters()),
            distractors_drawn=self.lists.drawn,
        )


class _CandidateLists:
    """Completes the candidates of one file's dialogues.

    Distractors are drawn uniformly from the responses of the file's other dialogues, all
    different and none equal to the right one. The order is drawn too, also that of lists that came
    with the file, so that it does not tell the answer. What is drawn depends only on the seed and
    on the dialogue's place in the file: other settings leave the lists as they are.

    Args:
        dialogues: all of the file.
        per_turn: candidates of a turn, the right one included.
    """

    def __init__(self, dialogues: Sequence[Dialogue], per_turn: int, seed: int, path: Path) -> None:
        self._per_turn, self._seed = per_turn, seed
        self._place = {d.where: i for i, d in enumerate(dialogues)}
        self._responses = [(t.response, i) for i, d in enumerate(dialogues) for t in d.turns]
        self.drawn = any(len(d.turns[0].candidates) == 1 for d in dialogues)
        # Without the longest dialogue's own responses at least so many different ones are left.
        longest = max((len(d.turns) for d in dialogues), default=0)
        different = len({response for response, _ in self._responses})
        if self.drawn and different - longest < per_turn - 1:
            raise DataError(
                f"{path}: {per_turn - 1} distractors cannot be drawn from its {different} "
                "different responses; give a file with more dialogues, or fewer --candidates"
            )

    def complete(self, dialogue: Dialogue) -> Dialogue:
        """Returns the dialogue with ``per_turn`` candidates at every turn."""
        place = self._place[dialogue.where]
        generator = np.random.default_rng([self._seed, place])
        turns = tuple(self._complete(turn, place, generator) for turn in dialogue.turns)
        return dataclasses.replace(dialogue, turns=turns)

    def _complete(self, turn: Turn, place: int, generator: np.random.Generator) -> Turn:
        candidates = turn.candidates
        if len(candidates) == 1:
            candidates = (turn.response, *self._distractors(turn.response, place, generator))
        shuffled = tuple(candidates[i] for i in generator.permutation(len(candidates)))
        return Turn(turn.utterance, shuffled, shuffled.index(turn.response))

    def _distractors(self, response: str, place: int, generator: np.random.Generator) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < self._per_turn - 1:
            for i in generator.integers(len(self._responses), size=self._per_turn).tolist():
                text, speaker = self._responses[i]
                if speaker != place and text != response:
                    drawn[text] = None
        return list(drawn)[: self._per_turn - 1]


def _find(root: Path, retrain_file: str | None, test_file: str | None) -> tuple[Path, Path]:
    """Returns the file to retrain on and the one to test on."""
    if not root.exists():
        raise DataError(f"{root} does not exist; give the folder of the dialogues with --data")
    if root.is_file() or is_dialogues(root):
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


def _find_one(root: Path, name: str | None) -> Path:
    """Returns the file of a common start."""
    if not root.exists():
        raise DataError(f"{root} does not exist; give the folder of the dialogues with --data")
    if root.is_file() or is_dialogues(root):
        if name:
            raise DataError(f"{root} is one file; leave out --file, or give its folder with --data")
        return _named(root.parent, root.name)
    found = _named(root, name) if name else _first(root, START_FILES)
    if found is None:
        raise DataError(
            f"no dialogues in {root}: none of {', '.join(START_FILES)} is there; give another "
            "folder with --data, or name the file with --file"
        )
    return found


def _named(root: Path, name: str) -> Path:
    path = root / name
    if not is_dialogues(path):
        raise DataError(
            f"{path} is no file of dialogues: wanted a .txt or .jsonl file or a folder of the "
            "datasets library"
        )
    return path


def _first(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if is_dialogues(root / name)), None)


def _conversation(dialogue: Dialogue) -> tuple[str, ...]:
    """Returns what is said in a dialogue, the same from either side.

    The partner's side opens with silence and lacks the last response of the responder's side.
    """
    turns = dialogue.turns
    said = [plain(text) for turn in turns for text in (turn.utterance, turn.response)]
    return tuple(said[1:] if turns[0].utterance == SILENCE else said[:-1])
