"""A model's double, to take apart while the model stays as it is."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


def twin_of(model: nn.Module, *, empty: bool = False) -> nn.Module:
    """The same modules once more, with parameters and buffers of their own on the same memory.

    What is tied in ``model`` is tied in its twin. Changing the twin's modules leaves ``model``
    alone; changing its tensors in place does not.

    Args:
        model: any module.
        empty: the tensors have no memory at all instead, but shapes (device "meta").
    """
    memo: dict[int, Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        twin = torch.empty_like(tensor, device="meta") if empty else tensor.detach()
        if isinstance(tensor, nn.Parameter):
            twin = nn.Parameter(twin, tensor.requires_grad)
        memo[id(tensor)] = twin
    return copy.deepcopy(model, memo)
