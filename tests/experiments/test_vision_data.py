from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.lib.errors import DataError
from experiments.vision.data import (
    Dataset,
    Images,
    binary_tasks,
    few_shot,
    first_per_class,
    halved,
    load,
    load_cifar10,
    load_digits,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "cifar10"
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def tiles() -> np.ndarray:
    """10000 plain images [10000, 3, 32, 32]; image i has the colour (i % 251, i // 251, 7)."""
    i = np.arange(10000)
    colours = np.stack([i % 251, i // 251, np.full(10000, 7)], axis=1).astype(np.uint8)
    return np.broadcast_to(colours[:, :, None, None], (10000, 3, 32, 32))


@pytest.fixture(scope="module")
def made_grids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CIFAR-10's grid form with plain images."""
    root = tmp_path_factory.mktemp("grids")
    pixels = np.ascontiguousarray(tiles())
    grid = np.empty((3200, 3200, 3), np.uint8)
    for i in range(10000):  # one by one, unlike the loader
        row, column = 32 * (i // 100), 32 * (i % 100)
        grid[row : row + 32, column : column + 32] = pixels[i].transpose(1, 2, 0)
    Image.fromarray(grid).save(root / "test_batch.webp", lossless=True, quality=0, method=0)
    for name in BATCHES[:5]:
        shutil.copy(root / "test_batch.webp", root / f"{name}.webp")
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    manifest = {name: {"data_chw_sha256": digest} for name in BATCHES}
    (root / "manifest.json").write_text(json.dumps(manifest))
    np.savez(
        root / "labels.npz",
        train_labels=np.arange(50000, dtype=np.uint8) % 10,
        test_labels=np.arange(10000, dtype=np.uint8) % 10,
        label_names=np.array([f"class {i}" for i in range(10)]),
    )
    return root


@pytest.fixture
def grids(made_grids: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(made_grids, tmp_path / "grids"))


def test_digits_are_split_by_class_and_repeatable() -> None:
    data = load_digits()
    assert data.train.pixels.dtype == torch.uint8 and data.train.labels.dtype == torch.int64
    assert data.train.pixels.shape[1:] == (1, 8, 8)
    assert len(data.train) + len(data.held_out) == 1797
    total = torch.bincount(torch.cat([data.train.labels, data.held_out.labels]))
    assert torch.bincount(data.held_out.labels).tolist() == [round(0.4 * n) for n in total.tolist()]
    assert load_digits().sha256 == data.sha256
    seen = {tuple(p.flatten().tolist()) for p in data.train.pixels}
    held_out = [tuple(p.flatten().tolist()) for p in data.held_out.pixels]
    assert not any(p in seen for p in held_out)


def test_channel_statistics_are_those_of_the_training_pixels() -> None:
    data = load_digits()
    mean, deviation = data.channel_statistics()
    pixels = data.train.pixels.double()
    assert mean == pytest.approx([pixels.mean().item()])
    assert deviation == pytest.approx([pixels.std(correction=0).item()])


@pytest.mark.slow
def test_grids_are_cut_in_canonical_order(made_grids: Path) -> None:
    data = load_cifar10(made_grids)
    assert data.train.pixels.shape == (50000, 3, 32, 32)
    assert torch.equal(data.held_out.pixels, torch.from_numpy(tiles().copy()))
    assert torch.equal(data.train.labels[:12], torch.arange(12) % 10)
    assert data.class_names[9] == "class 9"


def test_damaged_grids_are_reported_by_name(grids: Path) -> None:
    with Image.open(grids / "data_batch_2.webp") as image:
        array = np.asarray(image).copy()
    array[1000, 1000] ^= 1  # one pixel, one bit
    Image.fromarray(array).save(grids / "data_batch_2.webp", lossless=True, quality=0, method=0)
    with pytest.raises(DataError, match=r"data_batch_2\.webp is damaged: its pixels' sha256"):
        load_cifar10(grids)
    for name, data, message in (
        ("data_batch_1.webp", b"RIFF", r"damaged \(not a readable image\)"),
        ("data_batch_1.webp", None, "missing"),
        ("labels.npz", b"PK", "damaged"),
        ("labels.npz", None, "missing"),
        ("manifest.json", b"[]", "damaged"),
    ):
        if data is None:
            (grids / name).unlink()
        else:
            (grids / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name} is {message}"):
            load_cifar10(grids)


@pytest.mark.slow
def test_wrong_labels_are_damage(grids: Path) -> None:
    names = np.array(["x"] * 10)
    few = np.zeros(10, np.uint8)
    np.savez(grids / "labels.npz", train_labels=few, test_labels=few, label_names=names)
    with pytest.raises(DataError, match="wanted 50000 labels from 0 to 9"):
        load_cifar10(grids)


def test_a_folder_without_data_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no CIFAR-10 in .*--data-root, or add --download"):
        load("cifar10", tmp_path)


@pytest.fixture
def torchvision_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Torchvision's layout with 20 images a batch, whose md5 torchvision is made to expect."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict) -> list[str]:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(name: str) -> list[str]:
        pixels = generator.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write(name, {"data": pixels, "labels": list(range(10)) * 2})

    meta = write("batches.meta", {"label_names": [f"class {i}" for i in range(10)]})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [batch(n) for n in BATCHES[:5]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [batch(BATCHES[5])])
    expected = {"filename": meta[0], "key": "label_names", "md5": meta[1]}
    monkeypatch.setattr(datasets.CIFAR10, "meta", expected)
    return tmp_path


def test_torchvision_layout(torchvision_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = load("cifar10", torchvision_folder)
    assert data.train.pixels.shape == (100, 3, 32, 32) and data.train.pixels.dtype == torch.uint8
    stored = pickle.loads((torchvision_folder / "cifar-10-batches-py/test_batch").read_bytes())
    flat = data.held_out.pixels.flatten(1).numpy()
    assert np.array_equal(flat, stored["data"])
    assert data.held_out.labels.tolist() == stored["labels"]
    assert data.class_names == tuple(f"class {i}" for i in range(10))
    assert capsys.readouterr().out == ""


def test_halved_images_are_means_of_four_pixels() -> None:
    pixels = torch.randint(256, (3, 3, 8, 8), dtype=torch.uint8)
    images = Images(pixels, torch.arange(3))
    small = halved(Dataset("x", images, images, ("a",), "")).train.pixels
    wanted = (pixels.double().view(3, 3, 4, 2, 4, 2).sum((3, 5)) / 4).round()
    assert torch.equal(small.double(), wanted)


def test_cifar10_at_half_its_size(torchvision_folder: Path) -> None:
    whole, half = load("cifar10", torchvision_folder), load("cifar10-16", torchvision_folder)
    assert half.train.pixels.shape == (100, 3, 16, 16) and half.name == "cifar10-16"
    assert torch.equal(half.held_out.labels, whole.held_out.labels) and half.sha256 == whole.sha256


def test_damaged_torchvision_layout_is_reported_by_name(torchvision_folder: Path) -> None:
    path = torchvision_folder / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="data_batch_3 is missing or damaged"):
        load("cifar10", torchvision_folder)
    path.unlink()
    with pytest.raises(DataError, match="data_batch_3 is missing or damaged"):
        load("cifar10", torchvision_folder)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no copy of CIFAR-10 beside the checkout")
def test_real_cifar10() -> None:
    data = load_cifar10(SHARED)
    assert torch.bincount(data.train.labels).tolist() == [5000] * 10
    assert torch.bincount(data.held_out.labels).tolist() == [1000] * 10
    mean, deviation = data.channel_statistics()
    published = ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])
    assert [round(m / 255, 4) for m in mean] == published[0]
    assert [round(s / 255, 4) for s in deviation] == published[1]


def numbered(count: int, classes: int) -> Images:
    """Images whose first pixel is their number, of classes in turn."""
    pixels = torch.arange(count, dtype=torch.uint8)[:, None, None, None]
    return Images(pixels, torch.arange(count) % classes)


def test_binary_tasks_label_each_pair() -> None:
    images, ids = binary_tasks(numbered(60, 6), [(0, 1), (5, 2)])
    assert len(images) == 40
    kinds = images.pixels.flatten().long() % 6
    for kind, label, task in zip(kinds.tolist(), images.labels.tolist(), ids.tolist(), strict=True):
        assert {0: (0, 0), 1: (1, 0), 5: (0, 1), 2: (1, 1)}[kind] == (label, task)
    assert ids.tolist() == sorted(ids.tolist())


def test_few_shots_are_balanced_nested_and_drawn_by_seed() -> None:
    images = numbered(100, 2)
    ten, twenty = few_shot(images, 10, 3), few_shot(images, 20, 3)
    assert torch.bincount(ten.labels).tolist() == [5, 5]
    assert torch.bincount(few_shot(images, 7, 3).labels).tolist() == [4, 3]
    numbers = [set(x.pixels.flatten().tolist()) for x in (ten, twenty)]
    assert len(numbers[0]) == 10 and numbers[0] < numbers[1]
    assert torch.equal(few_shot(images, 10, 3).pixels, ten.pixels)
    assert not torch.equal(few_shot(images, 10, 4).pixels, ten.pixels)
    with pytest.raises(DataError.__base__, match="--shots 102: the test task has only 50"):
        few_shot(images, 102, 0)


def test_first_per_class() -> None:
    kept = first_per_class(numbered(30, 3), 2)
    assert kept.pixels.flatten().tolist() == [0, 1, 2, 3, 4, 5]
