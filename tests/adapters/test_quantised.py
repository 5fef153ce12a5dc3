"""Bases whose weights are integers cannot be retrained, and are refused by name."""

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt


class Linear4bit(nn.Linear):
    """As quantising libraries make theirs: a subclass with packed integers for a weight."""

    def __init__(self):
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)


def model():
    return nn.Sequential(nn.Linear(4, 4), Linear4bit())


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["1"], "1"])
def test_quantised_layers(targets):
    plain = model()
    with pytest.raises(ValueError, match=r"^adapt: '1', a Linear4bit, is quantised; quantised"):
        adapt(plain, LoRAConfig(rank=1, target_modules=targets), 2)
    assert type(plain[0]) is nn.Linear


def test_quantised_models():
    """A transformer keeps its quantizer; its layers may be no nn.Linear at all."""
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.hf_quantizer = None
    adapt(plain, LoRAConfig(rank=1), 2)
    plain = nn.Sequential(nn.Linear(4, 4))
    plain.hf_quantizer = object()
    with pytest.raises(ValueError, match=r"^adapt: the model is quantised; .*quantization_config"):
        adapt(plain, LoRAConfig(rank=1), 2)
