"""MLP-Mixer (Tolstikhin et al., 2021) in the size of the paper's appendix E.1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metalora.nn import drops_by_sample


@dataclass(frozen=True)
class MixerConfig:
    """Sizes of a Mixer; the defaults are the paper's for CIFAR-10.

    Attributes:
        image_size: height and width of the images.
        channels: their channels.
        patch_size: height and width of a patch; divides image_size.
        width: features of a patch.
        depth: number of blocks.
        token_hidden: hidden units of the MLP across patches.
        channel_hidden: hidden units of the MLP across features.
        dropout: probability of dropout inside both MLPs.
        classes: outputs.
        bias: whether linear layers have a bias.
    """

    image_size: int = 32
    channels: int = 3
    patch_size: int = 4
    width: int = 512
    depth: int = 1
    token_hidden: int = 256
    channel_hidden: int = 256
    dropout: float = 0.1
    classes: int = 2
    bias: bool = True

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"MixerConfig: patch_size must divide image_size={self.image_size}, "
                f"got {self.patch_size}"
            )

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class Dropout(nn.Dropout):
    """nn.Dropout with a cheaper mask on a CPU: four elements share one random 64-bit number.

    nn.Dropout's own mask takes a quarter of the training time of a Mixer there. The probability is
    rounded to a multiple of 2**-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or x.device.type != "cpu" or drops_by_sample():
            return super().forward(x)
        kept: Tensor = _Kept.apply(x, round(self.p * 2**16))
        return kept


# An operator, since torch.compile takes no ``random_`` and has no vector code for 16-bit integers.
@torch.library.custom_op(
    "metalora_vision::keep_mask", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def keep_mask(x: Tensor, dropped: int) -> Tensor:
    """0 for ``dropped`` of the 2**16 values of 16 random bits, else 1, in x's shape and dtype."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    values = words.view(torch.int16)[: x.numel()].view(x.shape)
    mask = torch.empty(x.shape, dtype=x.dtype)
    return torch.ge(values, dropped - 2**15, out=mask)


@keep_mask.register_fake
def _(x: Tensor, dropped: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


class _Kept(torch.autograd.Function):
    """x · mask · scale, in one pass: a third of the time of torch.where, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: int) -> Tensor:
        mask = keep_mask(x, dropped)
        ctx.save_for_backward(mask)
        ctx.scale = 2**16 / (2**16 - dropped)
        return torch.addcmul(x.new_zeros(()), x, mask, value=ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.addcmul(grad.new_zeros(()), grad, mask, value=ctx.scale), None


class MLP(nn.Sequential):
    """Two linear layers over the last dimension, with GELU and dropout."""

    def __init__(self, features: int, hidden: int, dropout: float, bias: bool):
        super().__init__(
            nn.Linear(features, hidden, bias=bias),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(hidden, features, bias=bias),
            Dropout(dropout),
        )


class MixerBlock(nn.Module):
    """Mixes across patches, then across features; both are residual."""

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.token_norm = nn.LayerNorm(config.width)
        self.token_mlp = MLP(config.patches, config.token_hidden, config.dropout, config.bias)
        self.channel_norm = nn.LayerNorm(config.width)
        self.channel_mlp = MLP(config.width, config.channel_hidden, config.dropout, config.bias)

    def forward(self, x: Tensor) -> Tensor:  # [B, patches, width]
        across = self.token_norm(x).transpose(1, 2).contiguous()  # [B, width, patches]
        x = x + self.token_mlp(across).transpose(1, 2)
        return x + self.channel_mlp(self.channel_norm(x))


class Mixer(nn.Module):
    """Maps images [B, channels, image_size, image_size] to logits [B, classes].

    Every learned map but the LayerNorms is an nn.Linear: the patch embedding `embed`, the four of
    each block, and the `head`.
    """

    def __init__(self, config: MixerConfig):
        super().__init__()
        self.config = config
        pixels = config.channels * config.patch_size**2
        self.embed = nn.Linear(pixels, config.width, bias=config.bias)
        self.blocks = nn.Sequential(*(MixerBlock(config) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes, bias=config.bias)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Returns what the head is applied to, [B, width]."""
        x = self.embed(patchify(images, self.config.patch_size))  # [B, patches, width]
        return self.norm(self.blocks(x)).mean(dim=1)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images [B, C, S, S] into patches [B, (S / patch)², C * patch²], row by row."""
    count, channels, size, _ = images.shape
    side = size // patch
    grid = images.view(count, channels, side, patch, side, patch)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(count, side * side, -1)


def unpatchify(patches: Tensor, channels: int) -> Tensor:
    """Undoes `patchify`: patches [B, N, C * P²] of a square of N become images [B, C, S, S]."""
    count, number, values = patches.shape
    side, patch = math.isqrt(number), math.isqrt(values // channels)
    grid = patches.view(count, side, side, channels, patch, patch)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(count, channels, side * patch, side * patch)
