from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from experiments.vision.mixer import Dropout, Mixer, MixerConfig, patchify
from experiments.vision.settings import MODELS


def expected_parameters(c: MixerConfig) -> int:
    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + (outputs if c.bias else 0)

    norm = 2 * c.width
    tokens = linear(c.patches, c.token_hidden) + linear(c.token_hidden, c.patches)
    channels = linear(c.width, c.channel_hidden) + linear(c.channel_hidden, c.width)
    block = 2 * norm + tokens + channels
    embed = linear(c.channels * c.patch_size**2, c.width)
    return embed + c.depth * block + norm + linear(c.width, c.classes)


@pytest.mark.parametrize("data", MODELS)
@pytest.mark.parametrize("bias", [True, False])
def test_sizes(data: str, bias: bool) -> None:
    config = dataclasses.replace(MODELS[data], bias=bias)
    model = Mixer(config)
    assert sum(p.numel() for p in model.parameters()) == expected_parameters(config)
    images = torch.randn(3, config.channels, config.image_size, config.image_size)
    assert model(images).shape == (3, 2)
    assert sum(isinstance(m, nn.Linear) for m in model.modules()) == 6


def test_the_papers_size() -> None:
    config = MODELS["cifar10"]
    assert (config.patches, config.width, config.depth) == (64, 512, 1)
    assert (config.token_hidden, config.channel_hidden, config.dropout) == (256, 256, 0.1)
    assert config.bias


def test_patches_are_cut_row_by_row() -> None:
    images = torch.randn(2, 1, 8, 8)
    patches = patchify(images, 2)
    for row in range(4):
        for column in range(4):
            patch = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            assert torch.equal(patches[:, 4 * row + column], patch.flatten(1))


def test_written_out() -> None:
    config = MixerConfig(8, 1, 4, 6, 2, 5, 3, 0.1)
    model = Mixer(config).double().eval()
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    x = model.embed(patchify(images, config.patch_size))
    for block in model.blocks:
        mixed = torch.empty_like(x)
        for feature in range(config.width):
            mixed[:, :, feature] = block.token_mlp(block.token_norm(x)[:, :, feature])
        x = x + mixed
        x = x + torch.stack(
            [block.channel_mlp(block.channel_norm(x[:, i])) for i in range(config.patches)], 1
        )
    torch.testing.assert_close(model(images), model.head(model.norm(x).mean(1)))


def test_every_parameter_gets_a_gradient_and_dropout_is_on() -> None:
    model = Mixer(MODELS["digits"])
    images = torch.randn(8, 1, 8, 8)
    assert not torch.equal(model(images), model(images))
    nn.functional.cross_entropy(model(images), torch.arange(8) % 2).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_patch_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="patch_size must divide image_size=32, got 5"):
        MixerConfig(patch_size=5)


@pytest.mark.parametrize("shape", [(400, 1001), (1, 1), (0, 3), (3, 5)])
def test_dropout_drops_and_scales(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer, x = Dropout(0.1), torch.full(shape, 2.0, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    dropped = y == 0
    assert torch.equal(x.grad == 0, dropped)
    torch.testing.assert_close(
        y[~dropped], torch.full_like(y[~dropped], 2 / 0.9), rtol=1e-4, atol=0
    )
    if y.numel() > 1000:
        # Over all elements, and each of the four that share a random number.
        for part in (dropped.flatten(), *(dropped.flatten()[i::4] for i in range(4))):
            deviation = (0.1 * 0.9 / part.numel()) ** 0.5
            assert abs(part.double().mean().item() - 0.1) < 5 * deviation
        assert not torch.equal(layer(x) == 0, dropped)
    assert torch.equal(layer.eval()(x), x)
