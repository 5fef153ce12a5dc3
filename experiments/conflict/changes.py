"""What changes the inputs of a task: a map of its images, drawn for each task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.vision.mixer import patchify, unpatchify

Change = Callable[[Tensor, Tensor], Tensor]
"""``change(images [B, C, S, S], tasks int64 [B])`` → images changed each by its own task's map.

Images are normalised: 0 is the mean of a channel over the training images."""


@dataclass(frozen=True)
class Rearranged:
    """Moves the values of an image to other places, and inverts it for some tasks.

    Attributes:
        source: int64 [T, C * S * S], from where each value of a task's images comes.
        sign: float32 [T, 1], 1, or -1 for tasks with inverted images.
    """

    source: Tensor
    sign: Tensor

    def __call__(self, images: Tensor, tasks: Tensor) -> Tensor:
        moved = images.flatten(1).gather(1, self.source[tasks])
        return moved.mul_(self.sign[tasks]).view(images.shape)


@dataclass(frozen=True)
class LowRank:
    """Maps each patch x to (I + strength · U_t U_tᵀ) x, as the truths of the linear model.

    With the inverse, I - strength / (1 + strength) · U_t U_tᵀ, it is undone exactly by an adapter
    of rank k on the layer that reads the patches; no last layer undoes it.

    Attributes:
        directions: float32 [T, D, k], U_t with orthonormal columns, of patches of D values.
        patch: height and width of a patch.
        strength: above -1, so that there is an inverse; or below it.
    """

    directions: Tensor
    patch: int
    strength: float

    def __call__(self, images: Tensor, tasks: Tensor) -> Tensor:
        own = self.directions[tasks]  # [B, D, k]
        patches = patchify(images, self.patch)  # [B, N, D]
        patches = patches + self.strength * torch.bmm(torch.bmm(patches, own), own.transpose(1, 2))
        return unpatchify(patches, images.shape[1])


def unchanged(images: Tensor, tasks: Tensor) -> Tensor:
    """Returns the images as they are."""
    return images


def views(count: int, channels: int, size: int, generator: torch.Generator) -> Rearranged:
    """Draws for each of ``count`` tasks quarter turns, an order of channels, and an inversion."""
    places = torch.arange(channels * size * size).view(channels, size, size)
    sources, signs = [], []
    for _ in range(count):
        turns = int(torch.randint(4, (), generator=generator))
        order = torch.randperm(channels, generator=generator)
        sources.append(places[order].rot90(turns, (1, 2)).flatten())
        signs.append(1.0 - 2.0 * float(torch.randint(2, (), generator=generator)))
    return Rearranged(torch.stack(sources), torch.tensor(signs)[:, None])


def shuffled_patches(
    count: int, channels: int, size: int, patch: int, generator: torch.Generator
) -> Rearranged:
    """Draws for each of ``count`` tasks an order of the patches."""
    places = patchify(torch.arange(channels * size * size).view(1, channels, size, size), patch)
    orders = [torch.randperm(places.shape[1], generator=generator) for _ in range(count)]
    sources = [unpatchify(places[:, order], channels).flatten() for order in orders]
    return Rearranged(torch.stack(sources), torch.ones(count, 1))


def low_rank(
    count: int, values: int, rank: int, patch: int, strength: float, generator: torch.Generator
) -> LowRank:
    """Draws for each of ``count`` tasks ``rank`` orthonormal directions of ``values`` values."""
    gaussian = torch.randn(count, values, rank, generator=generator, dtype=torch.float64)
    return LowRank(torch.linalg.qr(gaussian).Q.float(), patch, strength)


def flipped_tasks(counts: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Draws in each group of tasks which of them have their two labels exchanged.

    Args:
        counts: tasks of each group.
        share: of each group, rounded to whole tasks.

    Returns:
        bool [sum(counts)].
    """
    groups = []
    for count in counts:
        order = torch.randperm(count, generator=generator)
        groups.append(order < round(share * count))
    return torch.cat(groups)
