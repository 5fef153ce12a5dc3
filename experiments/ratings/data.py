"""Ratings of films by users, from the files of MovieLens-100K; the users of a trial."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.lib.errors import DataError, RunError
from metalora.meta import derive_seed

INTER, DATA = "ml-100k.inter", "u.data"  # in the package recbole, and in GroupLens' own folder
WHEEL = "recbole-1.2.1-*.whl"
COLUMNS = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
LOWEST, HIGHEST = 1.0, 5.0
# Of the published file's ratings, whatever the form they were read from.
PUBLISHED_SHA256 = "273f855410feb093231e19c35b690a9098bed32c77d1aa7b33d7cdcfec2d8b11"


@dataclass(frozen=True)
class Ratings:
    """Ratings of a file, sorted by user and item.

    Attributes:
        source: where they were read.
        users: int64 [N], the number of each rating's user; users are numbered in the order of
            their names, those that are numbers first.
        items: int64 [N], likewise.
        values: float32 [N], from 1 to 5.
        user_names, item_names: as in the file.
        sha256: of all users, items and values, independent of the form they were read from.
    """

    source: str
    users: Tensor
    items: Tensor
    values: Tensor
    user_names: tuple[str, ...]
    item_names: tuple[str, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.values)

    def notes(self) -> list[str]:
        """Returns a line if these are other ratings than MovieLens-100K's."""
        if self.sha256 == PUBLISHED_SHA256:
            return []
        return [
            f"note: {self.source} is not MovieLens-100K as published: {len(self)} ratings of "
            f"{self.num_users} users for {self.num_items} items, of 100000, 943 and 1682"
        ]

    @property
    def num_users(self) -> int:
        return len(self.user_names)

    @property
    def num_items(self) -> int:
        return len(self.item_names)


@dataclass(frozen=True)
class Part:
    """Some ratings of some users, sorted by user; the users are numbered as tasks.

    Attributes:
        items: int64 [N].
        values: float32 [N].
        tasks: int64 [N], from 0 on without gaps.
    """

    items: Tensor
    values: Tensor
    tasks: Tensor

    def __len__(self) -> int:
        return len(self.values)

    @property
    def num_tasks(self) -> int:
        return int(self.tasks[-1]) + 1

    @property
    def counts(self) -> Tensor:
        """Returns the number of ratings of each task, int64 [T]."""
        return torch.bincount(self.tasks)


@dataclass(frozen=True)
class Unseen:
    """Users that no retraining has seen.

    Attributes:
        users: int64 [U], their numbers.
        available: int64 [U], how many ratings of each are there for shots.
    """

    users: Tensor
    available: Tensor
    _ratings: Ratings
    _places: Tensor

    def too_few(self, shots: int) -> Tensor:
        """Returns the numbers of the users with fewer ratings than so many shots need."""
        return self.users[self.available < shots]

    def few(self, shots: int) -> tuple[Part, Part]:
        """Returns the shots of each user who has as many, and the user's held-out ratings.

        A smaller number of shots is part of a larger one, and a user's held-out ratings are the
        same for all numbers.

        Raises:
            RunError: no user has as many.
        """
        users = self.users[self.available >= shots]
        if len(users) == 0:
            raise RunError(
                f"--shots {shots}: no unseen user has as many ratings beside the held-out ones; at "
                f"most {int(self.available.max())} can be drawn"
            )
        available = torch.zeros(self._ratings.num_users, dtype=torch.int64)
        available[self.users] = self.available
        held_out = self._places >= available[self._ratings.users]
        return (
            _part(self._ratings, users, self._places < shots),
            _part(self._ratings, users, held_out),
        )


@dataclass(frozen=True)
class Split:
    """The users of a trial, and which of their ratings are for what.

    Attributes:
        retraining, validation: the retraining users' ratings to train on, and those of the same
            users that the epoch is chosen by.
        test: the users whom the results are about.
        choosing: the users whom choices are made by.
    """

    retraining: Part
    validation: Part
    test: Unseen
    choosing: Unseen


def load(root: Path) -> Ratings:
    """Reads the ratings of a file or of recbole's wheel, or of the folder that one is in.

    Args:
        root: ``ml-100k.inter`` (a line that names the columns, then a rating per line), ``u.data``
            (the same without the first line), an archive, or a folder with one of these.

    Raises:
        DataError: nothing is there, or a line is not as it must be; the message names it.
    """
    root = Path(root)
    if root.is_dir():
        names = (INTER, DATA, WHEEL)
        found = [p for name in names for p in sorted(root.glob(name)) if p.is_file()]
        if not found:
            raise DataError(
                f"no ratings in {root}: neither {INTER} nor {DATA} nor {WHEEL} is there; give one "
                "of them, or its folder, with --data-root"
            )
        root = found[0]
    try:
        data, source = _read(root)
    except FileNotFoundError:
        raise DataError(
            f"{root} does not exist; give {INTER} or {DATA}, the wheel that `pip download "
            "--no-deps recbole==1.2.1` fetches, or the folder of one with --data-root"
        ) from None
    except OSError as error:
        raise DataError(f"{root} cannot be read: {error.strerror or error}") from None
    return _parsed(data, source)


def made_up(
    users: int = 60,
    items: int = 40,
    *,
    biases: float = 0.4,
    tastes: float = 0.6,
    noise: float = 0.5,
    seed: int = 0,
) -> Ratings:
    """Draws ratings 3 + b_u + b_i + p_u · q_i + noise with two factors, rounded; half are missing.

    Args:
        users, items: how many.
        biases, tastes, noise: standard deviation of each b, of the factors' part per factor, and
            of the noise.
        seed: of all that is drawn.
    """
    random = np.random.default_rng(seed)
    of_users, of_items = random.normal(size=(users, 2)), random.normal(size=(items, 2))
    every = biases * (random.normal(size=(users, 1)) + random.normal(size=items))
    every += 3 + tastes * of_users @ of_items.T + noise * random.normal(size=(users, items))
    values = every.round().clip(LOWEST, HIGHEST)
    rated = random.random((users, items)).argsort(1)[:, : items // 2 + 1]
    found = {
        (str(user + 1), str(item + 1)): float(values[user, item])
        for user in range(users)
        for item in rated[user]
    }
    return _ratings("made-up ratings", found)


def split(
    ratings: Ratings,
    seed: int,
    *,
    tasks: int,
    validation_users: int,
    test_users: int,
    held_out: int,
    shot_pool: int,
    validation_share: float,
) -> Split:
    """Splits the users, and the ratings of each, by seed.

    The validation users are the same for every seed, so that no test user of any trial has a part
    in a choice made on them. The test users do not depend on ``tasks``, and fewer retraining users
    are part of more.

    Args:
        ratings: all of them.
        seed: of the trial.
        tasks: number of retraining users.
        validation_users, test_users: how many of each.
        held_out: ratings of an unseen user that are held out, at least.
        shot_pool: ratings of an unseen user that shots are drawn from, at most; the user's other
            ratings are held out.
        validation_share: part of each retraining user's ratings to choose the epoch by.

    Raises:
        RunError: there are not as many users, or a retraining user has a single rating.
    """
    wanted = tasks + validation_users + test_users
    if wanted > ratings.num_users:
        raise RunError(
            f"{wanted} users are needed ({tasks} to retrain, {validation_users} to validate, "
            f"{test_users} to test), but {ratings.source} has {ratings.num_users}; is it cut? "
            "Else lower --tasks, --validation-users or --test-users"
        )
    every = _shuffled(torch.arange(ratings.num_users), derive_seed("validation users", 0))
    choosing, others = every[:validation_users], every[validation_users:]
    others = _shuffled(others, derive_seed("users", seed))
    test, retraining = others[:test_users], others[test_users : test_users + tasks]
    places, counts = _places(ratings, derive_seed("ratings", seed))
    if len(retraining) and int(counts[retraining].min()) < 2:
        name = ratings.user_names[int(retraining[counts[retraining].argmin()])]
        raise RunError(
            f"user {name} of {ratings.source} has a single rating, but retraining needs two of "
            "each user, one of them to choose the epoch by; take the user out"
        )
    kept = counts - (counts * validation_share).round().long().clamp_min(1)
    trained_on = places < kept[ratings.users]

    def unseen(users: Tensor) -> Unseen:
        users = users.sort().values
        available = (counts[users] - held_out).clamp(0, shot_pool)
        return Unseen(users, available, ratings, places)

    return Split(
        _part(ratings, retraining, trained_on),
        _part(ratings, retraining, ~trained_on),
        unseen(test),
        unseen(choosing),
    )


def _shuffled(values: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return values[torch.randperm(len(values), generator=generator)]


def _places(ratings: Ratings, seed: int) -> tuple[Tensor, Tensor]:
    """Returns each rating's place in a random order of its user's, and how many each user has."""
    order = _shuffled(torch.arange(len(ratings)), seed)
    order = order[ratings.users[order].argsort(stable=True)]
    counts = torch.bincount(ratings.users, minlength=ratings.num_users)
    starts = counts.cumsum(0) - counts
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order)) - starts[ratings.users[order]]
    return places, counts


def _part(ratings: Ratings, users: Tensor, chosen: Tensor) -> Part:
    """Returns the chosen ratings, bool [N], of some users, who become tasks in their order."""
    task = torch.full((ratings.num_users,), -1)
    task[users] = torch.arange(len(users))
    tasks = task[ratings.users]
    index = ((tasks >= 0) & chosen).nonzero().flatten()
    index = index[tasks[index].argsort(stable=True)]
    return Part(ratings.items[index], ratings.values[index], tasks[index])


def _read(path: Path) -> tuple[bytes, str]:
    """Returns the bytes of the file, or of the archive's member, and where they come from."""
    data = path.read_bytes()
    if not data.startswith(b"PK"):
        return data, str(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for name in (INTER, DATA):
                for member in archive.namelist():
                    if Path(member).name == name:
                        return archive.read(member), f"{path}/{member}"
    except Exception as error:  # zipfile, zlib and struct raise many kinds for a damaged archive
        raise DataError(f"{path} is a damaged archive ({error}); fetch it again") from None
    raise DataError(f"{path} is an archive without {INTER} or {DATA}; give recbole's wheel 1.2.1")


def _parsed(data: bytes, source: str) -> Ratings:
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{source}, line {number}: is no text; give {INTER} or {DATA}") from None
    lines = text.split("\n")
    if lines.pop() != "":  # after the last line's end
        raise DataError(
            f"{source}, line {len(lines) + 1}: has no end, so the file is cut; fetch it again"
        )
    columns, first = list(COLUMNS), 1
    if lines and ":" in lines[0]:
        columns, first = lines[0].rstrip("\r").split("\t"), 2
        _check_header(columns, source)
    at = [columns.index(name) for name in COLUMNS[:3]]
    found: dict[tuple[str, str], float] = {}
    where: dict[tuple[str, str], int] = {}
    for number, line in enumerate(lines[first - 1 :], first):
        fields = line.rstrip("\r").split("\t")
        if len(fields) != len(columns) or "" in fields:
            raise DataError(
                f"{source}, line {number}: wanted {len(columns)} fields with tabs between them "
                f"({', '.join(columns)}), got {line[:60]!r}; is the file cut, or another one?"
            )
        user, item, text = (fields[i] for i in at)
        value = _rating(text)
        if value is None:
            raise DataError(
                f"{source}, line {number}: the rating must be a number from {LOWEST:g} to "
                f"{HIGHEST:g}, got {text!r}"
            )
        if (user, item) in found:
            raise DataError(
                f"{source}, line {number}: user {user} has rated item {item} already, in line "
                f"{where[user, item]}; take one of them out"
            )
        found[user, item], where[user, item] = value, number
    if not found:
        raise DataError(f"{source} holds no ratings; fetch it again")
    return _ratings(source, found)


def _check_header(columns: Sequence[str], source: str) -> None:
    unknown = [name for name in columns if name not in COLUMNS]
    missing = [name for name in COLUMNS[:3] if name not in columns]
    if unknown or missing or len(set(columns)) < len(columns):
        what = f"unknown column {unknown[0]!r}" if unknown else "a column is missing or doubled"
        raise DataError(
            f"{source}, line 1: {what}; wanted {', '.join(COLUMNS)} with tabs between them, got "
            f"{', '.join(columns)}"
        )


def _rating(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and LOWEST <= value <= HIGHEST else None


def _ratings(source: str, found: dict[tuple[str, str], float]) -> Ratings:
    names = [sorted({pair[i] for pair in found}, key=_by_number) for i in (0, 1)]
    users, items = ({name: i for i, name in enumerate(every)} for every in names)
    rows = sorted((users[user], items[item], value) for (user, item), value in found.items())
    digest = hashlib.sha256()
    for user, item, value in rows:
        digest.update(f"{names[0][user]}\t{names[1][item]}\t{value:g}\n".encode())
    columns = np.array(rows, dtype=np.float64).T
    return Ratings(
        source,
        torch.from_numpy(columns[0].astype(np.int64)),
        torch.from_numpy(columns[1].astype(np.int64)),
        torch.from_numpy(columns[2].astype(np.float32)),
        tuple(names[0]),
        tuple(names[1]),
        digest.hexdigest(),
    )


def _by_number(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)
