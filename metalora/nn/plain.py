"""The plain layers that those with adapters stand for: nn.Linear, and Conv1D of transformers."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is the Conv1D of transformers, as in GPT-2: linear, its weight [in, out]."""
    kind = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    return kind is not None and type(module) is kind


def is_linear(module: nn.Module) -> bool:
    """Whether it is an nn.Linear, of whatever subclass, or a Conv1D of transformers."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def features_of(linear: Any) -> tuple[int, int]:
    """How many features go into a layer that `is_linear`, and come out of it."""
    if is_conv1d(linear):
        return linear.nx, linear.nf
    return linear.in_features, linear.out_features


def as_linear(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Linear:
    """An nn.Linear made of these very parameters, [out, in] and [out]."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    linear.register_parameter("bias", bias)
    return linear.train(training)


def as_conv1d(weight: nn.Parameter, bias: nn.Parameter | None, training: bool) -> nn.Module:
    """A Conv1D of transformers made of these very parameters, [in, out] and [out]."""
    from transformers.pytorch_utils import Conv1D

    conv1d: Any = Conv1D(0, 0)
    conv1d.nx, conv1d.nf = weight.shape
    conv1d.weight = weight
    conv1d.register_parameter("bias", bias)
    trained: nn.Module = conv1d.train(training)
    return trained
