"""Whether code runs under a transform that knows PyTorch's own operators only."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

from metalora._library import constant_when_compiled


def faking() -> bool:
    """Whether tensors are made without values here, under FakeTensorMode."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


@constant_when_compiled
def transformed() -> bool:
    """Whether `torch.func` transforms what is computed here, or forward-mode derivatives are taken.

    Both refuse an autograd.Function in the classic form, which costs a third of the form they take.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
