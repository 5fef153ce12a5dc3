"""Restoring a model after a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from metalora.adapters.fused_paths import reopen_fused_paths
from metalora.adapters.state import unfreeze_base


@contextmanager
def as_before(model: nn.Module, *, always: bool = False) -> Iterator[None]:
    """After any exception inside, even an interrupt, restores ``model`` as it was on entering.

    Restored are its modules and their modes, its buffers and their values, and ``requires_grad`` of
    the parameters. Their values are left alone, as fine-tuning does not change them.

    Args:
        model: the model.
        always: restore it without an exception too.
    """
    modules = [
        (module, dict(module._modules), dict(module._buffers), module.training)
        for module in model.modules()
    ]
    parameters = [(p, p.requires_grad) for p in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    done = False
    try:
        yield
        done = True
    finally:
        if always or not done:
            for module, children, own, training in modules:
                module._modules.update(children)
                module._buffers.update(own)  # some models assign a new tensor
                module.training = training
            reopen_fused_paths(model)
            unfreeze_base(model)
            for parameter, flag in parameters:
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, value in buffers:
                    if not torch.equal(buffer, value):  # an expanded one cannot be written to
                        buffer.copy_(value)
