"""Random crops and flips of whole batches, on the device the images live on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """A random crop of the zero-padded image and, optionally, a random horizontal flip.

    The result depends on the pixels and the generator's state alone; the input is not changed.

    Attributes:
        pad: zero pixels added on every side before the crop; 0 leaves the images where they are.
        flip: mirror each image with probability 1/2.
    """

    pad: int
    flip: bool

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augments uint8 [B, C, H, W] to the same shape, each image by itself."""
        count, _, height, width = pixels.shape
        device = generator.device
        span = 2 * self.pad + 1
        shift = torch.randint(span, (2, count), generator=generator, device=device)
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
        if self.pad:
            padded = F.pad(pixels, (self.pad,) * 4)
            # [B, C, span, span, H, W]: a view of every crop there is; indexing copies one of each.
            crops = padded.unfold(2, height, 1).unfold(3, width, 1)
            rows, columns = shift.to(pixels.device)
            pixels = crops[torch.arange(count, device=pixels.device), :, rows, columns]
        if self.flip:
            mirror = mirrored.to(pixels.device)[:, None, None, None]
            pixels = torch.where(mirror, pixels.flip(3), pixels)
        return pixels


class Normalize:
    """Turns uint8 [B, C, H, W] into float32 of mean 0 and deviation 1 per channel.

    Args:
        mean: [C], on the scale 0 to 255.
        deviation: [C], likewise.
        augmentation: applied first; None for evaluation.
    """

    def __init__(
        self,
        mean: Sequence[float],
        deviation: Sequence[float],
        augmentation: Augmentation | None = None,
    ):
        scale = 1 / torch.tensor(deviation).clamp_min(1e-6)
        self._scale = scale[:, None, None]
        self._shift = (-torch.tensor(mean) * scale)[:, None, None]
        self._augmentation = augmentation

    def __call__(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if self._augmentation is not None and generator is not None:
            pixels = self._augmentation(pixels, generator)
        scale, shift = self._scale.to(pixels.device), self._shift.to(pixels.device)
        return (pixels * scale).add_(shift)


def frozen(pixels: Tensor, augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Augments the whole set [N, C, H, W] once, as the authors' vision runs do."""
    parts = [augmentation(part, generator) for part in pixels.split(4096)]
    return torch.cat(parts)
