from __future__ import annotations

import pytest
import torch
from torch import Tensor

from experiments.vision.augment import Augmentation, Normalize, frozen


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 200, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randint(0, 256, (count, channels, size, size), generator=generator(1)).byte()


def crop(image: Tensor, pad: int, top: int, left: int, mirrored: bool) -> Tensor:
    """One image, pixel by pixel."""
    channels, height, width = image.shape
    out = torch.zeros_like(image)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                row = y + top - pad
                column = (width - 1 - x if mirrored else x) + left - pad
                if 0 <= row < height and 0 <= column < width:
                    out[c, y, x] = image[c, row, column]
    return out


@pytest.mark.parametrize(("pad", "flip"), [(2, True), (2, False), (0, True), (1, False)])
def test_each_image_is_some_crop_of_itself(pad: int, flip: bool) -> None:
    pixels = images(30, channels=2, size=5)
    before = pixels.clone()
    out = Augmentation(pad, flip)(pixels, generator())
    assert torch.equal(pixels, before)
    assert out.dtype == torch.uint8 and out.shape == pixels.shape
    span = range(2 * pad + 1)
    for image, augmented in zip(pixels, out, strict=True):
        candidates = [
            crop(image, pad, top, left, mirrored)
            for top in span
            for left in span
            for mirrored in ([False, True] if flip else [False])
        ]
        assert sum(torch.equal(augmented, c) for c in candidates) >= 1


def test_all_shifts_and_flips_occur_about_equally() -> None:
    # A single bright pixel in the middle tells where the crop was; left of it a dark one, the flip.
    pixels = torch.zeros(9000, 1, 5, 5, dtype=torch.uint8)
    pixels[:, 0, 2, 2], pixels[:, 0, 2, 1] = 200, 100
    out = Augmentation(1, flip=True)(pixels, generator())[:, 0]
    places = (out == 200).flatten(1).nonzero()[:, 1]
    counts = torch.bincount(places, minlength=25)
    assert (counts > 0).sum() == 9
    assert (counts[counts > 0] - 1000).abs().max() < 150  # 5 standard deviations
    dark = (out == 100).flatten(1).nonzero()[:, 1]
    mirrored = (dark > places).sum().item()
    assert abs(mirrored - 4500) < 240


def test_a_pure_function_of_the_generator() -> None:
    augmentation = Augmentation(2, flip=True)
    first = augmentation(images(), generator(5))
    torch.rand(7)  # torch's own generator does not matter
    assert torch.equal(first, augmentation(images(), generator(5)))
    assert not torch.equal(first, augmentation(images(), generator(6)))


def test_normalize_is_fused_with_augmentation() -> None:
    pixels = images()
    mean, deviation = [100.0, 120.0, 130.0], [50.0, 60.0, 70.0]
    plain = Normalize(mean, deviation)(pixels)
    expected = (pixels.double() - torch.tensor(mean)[:, None, None]) / (
        torch.tensor(deviation)[:, None, None]
    )
    assert plain.dtype == torch.float32
    torch.testing.assert_close(plain.double(), expected, atol=1e-6, rtol=1e-6)
    augmentation = Augmentation(2, flip=True)
    fused = Normalize(mean, deviation, augmentation)
    separate = Normalize(mean, deviation)(augmentation(pixels, generator(3)))
    assert torch.equal(fused(pixels, generator(3)), separate)


def test_frozen_augments_every_image_once() -> None:
    pixels = images(5000, channels=1)
    once = frozen(pixels, Augmentation(2, flip=True), generator())
    assert once.shape == pixels.shape and once.dtype == torch.uint8
    assert (once != pixels).flatten(1).any(1).float().mean() > 0.9
    assert torch.equal(once, frozen(pixels, Augmentation(2, flip=True), generator()))
