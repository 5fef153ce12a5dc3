"""Torch's transformer layers, which in inference read `linear1.weight` and never call `linear1`."""

from __future__ import annotations

from torch import nn

from metalora.nn import TaskLayer

_SAVED = "_metalora_fused_path"


def check_batch_first(model: nn.Module, names: list[str]) -> None:
    """Raises ValueError if a layer to adapt lies in a transformer layer that wants [L, B, d]."""
    for name in names:
        parts = name.split(".")
        for depth in range(len(parts)):
            outer = ".".join(parts[:depth])
            module = model.get_submodule(outer)
            if not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
                continue
            if not module.self_attn.batch_first:
                raise ValueError(
                    f"adapt: {outer!r} is a {type(module).__name__} with batch_first=False, where "
                    f"{name!r} cannot tell the samples apart; build it with batch_first=True"
                )


def close_fused_paths(model: nn.Module, adapted: type[object] = TaskLayer) -> None:
    """Makes transformer layers that hold ``adapted`` layers call them, in inference too.

    nn.TransformerEncoderLayer's fused path, and the nested tensors that nn.TransformerEncoder makes
    for it, would compute with W alone. Each depends on an attribute that nothing else reads.
    """
    for module in model.modules():
        if not any(isinstance(inner, adapted) for inner in module.modules()):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            _set(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder):
            _set(module, "use_nested_tensor", False)


def reopen_fused_paths(model: nn.Module) -> None:
    """Undoes `close_fused_paths`."""
    for module in model.modules():
        saved = module.__dict__.pop(_SAVED, None)
        if saved is not None:
            setattr(module, *saved)


def _set(module: nn.Module, attribute: str, value: object) -> None:
    if _SAVED not in module.__dict__:
        module.__dict__[_SAVED] = (attribute, getattr(module, attribute))
        setattr(module, attribute, value)
