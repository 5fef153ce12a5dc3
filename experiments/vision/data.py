"""CIFAR-10 and the handwritten digits, each as one uint8 tensor; binary tasks made of them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.lib.errors import DataError, RunError

TORCHVISION_FOLDER = "cifar-10-batches-py"
GRID_MANIFEST = "manifest.json"
TRAIN_BATCHES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_BATCH = "test_batch"
SPLIT_SEED = 0
DIGITS_HELD_OUT = 0.4

Pair = tuple[int, int]  # the classes that a task tells apart


@dataclass(frozen=True)
class Images:
    """A labelled set of images.

    Attributes:
        pixels: uint8 [N, C, H, W].
        labels: int64 [N], the class of each image.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return self.labels.shape[0]

    def select(self, index: Tensor) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """Images to train on and held-out ones, with the checksum of all of them.

    Attributes:
        train: images to train on.
        held_out: images for validation (retraining tasks) and the reported accuracy (test task).
        class_names: name of each class.
        sha256: of all pixels and labels, independent of the form they were read from.
    """

    name: str
    train: Images
    held_out: Images
    class_names: tuple[str, ...]
    sha256: str

    def channel_statistics(self) -> tuple[list[float], list[float]]:
        """Returns mean and standard deviation [C] of the training pixels, on the scale 0 to 255."""
        moments = []
        for channel in range(self.train.pixels.shape[1]):
            counts = torch.bincount(self.train.pixels[:, channel].flatten(), minlength=256).double()
            values = torch.arange(256, dtype=torch.float64, device=counts.device)
            mean = (counts @ values / counts.sum()).item()
            variance = (counts @ (values - mean) ** 2 / counts.sum()).item()
            moments.append((mean, variance**0.5))
        return [m for m, _ in moments], [s for _, s in moments]


def load(name: str, root: Path, download: bool = False) -> Dataset:
    """Loads "digits" (comes with scikit-learn), or from ``root`` "cifar10" or "cifar10-16".

    Raises:
        DataError: nothing is there, or a file is missing or damaged.
    """
    if name == "digits":
        return load_digits()
    images = load_cifar10(root, download)
    return images if name == "cifar10" else halved(images)


def load_digits() -> Dataset:
    """Loads scikit-learn's 1797 handwritten digits, 8 x 8; 40 % of each class are held out."""
    from sklearn.datasets import load_digits as bundled

    digits = bundled()
    # 17 grey levels, stretched to 0 to 240 so that they are exact in uint8.
    pixels = torch.from_numpy((digits.images * 15).astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    train, held_out = [], []
    for label in range(10):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        count = round(len(members) * DIGITS_HELD_OUT)
        held_out.append(members[:count])
        train.append(members[count:])
    images = Images(pixels, labels)
    return _dataset(
        "digits",
        images.select(torch.cat(train).sort().values),
        images.select(torch.cat(held_out).sort().values),
        [str(n) for n in digits.target_names],
    )


def load_cifar10(root: Path, download: bool = False) -> Dataset:
    """Loads CIFAR-10 in torchvision's layout, or as grids of images beside a manifest.json.

    Args:
        root: the folder that holds ``cifar-10-batches-py``, or ``manifest.json`` with one
            ``<batch>.webp`` per batch (100 x 100 images in canonical order) and ``labels.npz``.
        download: let torchvision download what is missing.
    """
    root = Path(root)
    if (root / GRID_MANIFEST).is_file():
        return _load_grids(root)
    if (root / TORCHVISION_FOLDER).is_dir() or download:
        return _load_torchvision(root, download)
    raise DataError(
        f"no CIFAR-10 in {root}: neither {TORCHVISION_FOLDER}/ nor {GRID_MANIFEST} is there; "
        "give its folder with --data-root, or add --download where there is a network"
    )


def halved(dataset: Dataset) -> Dataset:
    """Returns the images at half their height and width, each pixel the mean of four, rounded."""

    def smaller(images: Images) -> Images:
        pixels = F.avg_pool2d(images.pixels.float(), 2).round().to(torch.uint8)
        return Images(pixels, images.labels)

    size = dataset.train.pixels.shape[-1] // 2
    return Dataset(
        f"{dataset.name}-{size}",
        smaller(dataset.train),
        smaller(dataset.held_out),
        dataset.class_names,
        dataset.sha256,
    )


def binary_tasks(images: Images, pairs: Sequence[Pair]) -> tuple[Images, Tensor]:
    """Selects the images of the given pairs of classes, labelled 0 and 1, sorted by task.

    Returns:
        images whose label says which class of its pair each shows, and their tasks int64 [N].
    """
    index, labels, task_ids = [], [], []
    for task, pair in enumerate(pairs):
        for label, kind in enumerate(pair):
            members = (images.labels == kind).nonzero().flatten()
            index.append(members)
            labels.append(torch.full_like(members, label))
            task_ids.append(torch.full_like(members, task))
    return Images(images.pixels[torch.cat(index)], torch.cat(labels)), torch.cat(task_ids)


def few_shot(images: Images, shots: int, seed: int) -> Images:
    """Draws ``shots`` images of a binary task by seed, balanced over its two classes.

    For the same seed a smaller draw is part of a larger one. An odd ``shots`` gives class 0 one
    more.

    Raises:
        RunError: there are not as many images.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for label, count in ((0, (shots + 1) // 2), (1, shots // 2)):
        members = (images.labels == label).nonzero().flatten()
        if count > len(members):
            raise RunError(
                f"--shots {shots}: the test task has only {len(members)} training images of its "
                f"class {label}; at most {2 * len(members)} can be drawn"
            )
        order = torch.randperm(len(members), generator=generator).to(members.device)
        drawn.append(members[order[:count]])
    return images.select(torch.cat(drawn))


def first_per_class(images: Images, count: int) -> Images:
    """Keeps the first ``count`` images of every class, for shorter runs."""
    kept = [(images.labels == kind).nonzero().flatten()[:count] for kind in images.labels.unique()]
    return images.select(torch.cat(kept).sort().values)


def _load_torchvision(root: Path, download: bool) -> Dataset:
    from torchvision.datasets import CIFAR10

    folder = root / TORCHVISION_FOLDER
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints while it verifies
            parts = [CIFAR10(str(root), train=t, download=download) for t in (True, False)]
    except RuntimeError:
        raise DataError(
            f"{_damaged_batch(folder)} is missing or damaged (its md5 is not the published one); "
            "delete the folder and add --download where there is a network"
        ) from None
    except OSError as error:
        raise DataError(
            f"cannot download CIFAR-10 to {root} ({error}); put {TORCHVISION_FOLDER}/ there by "
            "hand or give its folder with --data-root"
        ) from None
    train, held_out = (
        Images(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets),
        )
        for part in parts
    )
    return _dataset("cifar10", train, held_out, parts[0].classes)


def _damaged_batch(folder: Path) -> Path:
    """Returns the first file of the folder that is not what torchvision publishes."""
    from torchvision.datasets import CIFAR10

    files = [*CIFAR10.train_list, *CIFAR10.test_list]
    meta = CIFAR10.meta
    for name, md5 in [*files, [meta["filename"], meta["md5"]]]:
        path = folder / name
        if not path.is_file() or hashlib.md5(path.read_bytes()).hexdigest() != md5:
            return path
    return folder


def _load_grids(root: Path) -> Dataset:
    labels = root / "labels.npz"
    try:
        manifest = json.loads((root / GRID_MANIFEST).read_text(encoding="utf-8"))
        checksums = {b: manifest[b]["data_chw_sha256"] for b in (*TRAIN_BATCHES, TEST_BATCH)}
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{root / GRID_MANIFEST} is damaged; fetch the data again") from None
    try:
        with np.load(labels) as stored:
            train_labels, test_labels = stored["train_labels"], stored["test_labels"]
            names = [str(n) for n in stored["label_names"]]
    except FileNotFoundError:
        raise DataError(f"{labels} is missing; fetch the data again") from None
    except Exception:  # numpy and zipfile raise many kinds for a damaged archive
        raise DataError(f"{labels} is damaged; fetch the data again") from None
    train = np.concatenate([_grid(root / f"{b}.webp", checksums[b]) for b in TRAIN_BATCHES])
    test = _grid(root / f"{TEST_BATCH}.webp", checksums[TEST_BATCH])
    for pixels, values in ((train, train_labels), (test, test_labels)):
        if values.shape != (len(pixels),) or values.max() > 9:
            raise DataError(
                f"{labels} is damaged: wanted {len(pixels)} labels from 0 to 9, "
                f"got shape {values.shape}; fetch the data again"
            )
    return _dataset("cifar10", _images(train, train_labels), _images(test, test_labels), names)


def _grid(path: Path, sha256: str) -> np.ndarray:
    """Reads the 10000 images [10000, 3, 32, 32] of one grid and checks their sha256."""
    from PIL import Image

    try:
        with _large_images_allowed(), Image.open(path) as image:
            grid = np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise DataError(f"{path} is missing; fetch the data again") from None
    except OSError:
        raise DataError(f"{path} is damaged (not a readable image); fetch it again") from None
    if grid.shape != (3200, 3200, 3):
        raise DataError(f"{path} is damaged: wanted 3200 x 3200 pixels, got {grid.shape[:2]}")
    tiles = grid.reshape(100, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3)
    pixels = np.ascontiguousarray(tiles).reshape(10000, 3, 32, 32)
    if hashlib.sha256(pixels.data).hexdigest() != sha256:
        raise DataError(
            f"{path} is damaged: its pixels' sha256 is not the one in {GRID_MANIFEST}; "
            "fetch it again"
        )
    return pixels


@contextlib.contextmanager
def _large_images_allowed() -> Iterator[None]:
    from PIL import Image

    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _images(pixels: np.ndarray, labels: np.ndarray) -> Images:
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def _dataset(name: str, train: Images, held_out: Images, class_names: Sequence[str]) -> Dataset:
    digest = hashlib.sha256()
    for tensor in (train.pixels, train.labels, held_out.pixels, held_out.labels):
        digest.update(tensor.numpy().data)
    return Dataset(name, train, held_out, tuple(class_names), digest.hexdigest())
