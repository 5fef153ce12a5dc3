"""Models of transformers that take packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metalora._checks import SHORT, first_line
from metalora._optional import require
from metalora.hf.attention import NAME, Packing, register
from metalora.meta.evaluation import evaluation_mode
from metalora.meta.steps import call_model
from metalora.nn import tasks

_HANDLES = "_metalora_packing"
_LENGTHS = (3, 5)  # of the two sequences that a model is tried with


def enable_packing(model: nn.Module) -> nn.Module:
    """Makes a model of transformers take packed sequences too, in place.

    Packed inputs are "input_ids" and "position_ids" [1, N] of concatenated sequences, and their
    `Packing` as "packing", as `SequencePasses` makes them. After the encoder only the first token
    of each sequence is used, so the logits are [S, classes]. The model is tried at once: two packed
    sequences must give the same outputs as padded ones.

    Works before and after `metalora.adapt`, and saves as the plain model does.

    Args:
        model: a model of transformers, or one around it.

    Returns:
        ``model``.

    Raises:
        ImportError: if transformers is not installed, or not in a supported version.
        ValueError: if it cannot; `packing_problem` says why beforehand.
    """
    _enable(model)
    problem = _difference(model)
    if problem is not None:
        disable_packing(model)
        raise ValueError(f"enable_packing: {problem}; pad its sequences instead")
    return model


def disable_packing(model: nn.Module) -> nn.Module:
    """Undoes `enable_packing`.

    Raises:
        ImportError: see `enable_packing`.
    """
    inner = _transformer("disable_packing", model)
    if inner is not None and _HANDLES in inner.__dict__:
        before, handles = inner.__dict__.pop(_HANDLES)
        for handle in handles:
            handle.remove()
        inner.set_attn_implementation(before)
    return model


def packing_problem(model: nn.Module) -> str | None:
    """Why `enable_packing` would refuse this model; None if it would not.

    Raises:
        ImportError: see `enable_packing`.
    """
    inner = _transformer("packing_problem", model)
    enabled = inner is not None and _HANDLES in inner.__dict__
    try:
        _enable(model)
        return _difference(model)
    except ValueError as problem:
        return str(problem).removeprefix("enable_packing: ")
    finally:
        if not enabled:
            disable_packing(model)


def position_offset(model: nn.Module) -> int:
    """The position of a sequence's first token: RoBERTa's follow the padding token's, others' 0."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _transformer(function: str, model: nn.Module) -> Any:
    """The model of transformers that ``model`` is or has inside."""
    kind = require("transformers", function).PreTrainedModel
    return next((m for m in model.modules() if isinstance(m, kind)), None)


def _enable(model: nn.Module) -> None:
    inner = _transformer("enable_packing", model)
    if inner is None:
        raise ValueError(
            f"enable_packing: model must be one of transformers, got {type(model).__name__}"
        )
    if _HANDLES in inner.__dict__:
        return
    if not inner._can_set_attn_implementation():
        raise ValueError(
            f"enable_packing: {type(inner).__name__} has an attention of its own, not transformers'"
        )
    register()
    base = inner.base_model
    encoder = getattr(base, "encoder", None) or getattr(base, "transformer", None) or base
    handles = _FirstTokens().hook(encoder)
    inner.__dict__[_HANDLES] = inner.config._attn_implementation, handles
    inner.set_attn_implementation(NAME)


class _FirstTokens:
    """Hooks that make an encoder give each packed sequence's first token alone, [S, 1, H].

    In a last layer like BERT's all other tokens are dropped right after attention, which saves
    three quarters of that layer; in other models they are dropped after the encoder.
    """

    def __init__(self) -> None:
        self._packing: Packing | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # a model may be unpickled where transformers does not know `attention` yet
        self.__dict__.update(state)

    def hook(self, encoder: nn.Module) -> list[Any]:
        """Puts the hooks in place; their handles."""
        last: Any = [*getattr(encoder, "layer", [None])][-1]
        attention: Any = getattr(last, "attention", None)
        if hasattr(attention, "self") and hasattr(attention, "output"):
            return [
                attention.self.register_forward_hook(self._behind_attention, with_kwargs=True),
                attention.output.register_forward_pre_hook(self._before_output),
            ]
        return [encoder.register_forward_hook(self._behind_encoder, with_kwargs=True)]

    def _behind_encoder(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if kwargs.get("packing") is not None:
            output.last_hidden_state = _pick(output.last_hidden_state, kwargs["packing"])
        return output

    def _behind_attention(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        self._packing = kwargs.get("packing")
        if self._packing is None:
            return output
        return _pick(output[0], self._packing), *output[1:]

    def _before_output(self, module: Any, args: Any) -> Any:
        packing, self._packing = self._packing, None
        if packing is None:
            return args
        attended, hidden = args
        return attended, _pick(hidden, packing)


def _pick(hidden: Tensor, packing: Packing) -> Tensor:
    return hidden[0].index_select(0, packing.firsts)[:, None]


def _difference(model: nn.Module) -> str | None:
    """How the model's outputs for packed sequences are wrong; None if they are right."""
    inner = _transformer("enable_packing", model)
    kind = type(inner).__name__
    try:
        with evaluation_mode(model):
            for part in dict.fromkeys((inner.base_model, model)):
                packed, padded, changed = _outputs(part, inner)
                if packed.shape != padded.shape:
                    shapes = f"{list(packed.shape)} instead of {list(padded.shape)}"
                    return f"{kind} gives {shapes} for packed sequences"
                if not torch.equal(packed[0], changed[0]):
                    return f"{kind} lets packed sequences see each other"
                limit = (5e-2 if padded.dtype in SHORT else 5e-3) * padded.abs().max()
                if not bool(((packed - padded).abs() <= limit).all()):
                    return f"{kind} gives other outputs for packed sequences"
    except Exception as problem:
        return f"{kind} does not take packed sequences: {first_line(problem)}"
    return None


def _outputs(model: nn.Module, inner: Any) -> list[Tensor]:
    """The logits, or each first token's last hidden state, of two sequences.

    Packed, padded, and packed with other tokens in the second.
    """
    device = next(model.parameters()).device
    pad = getattr(inner.config, "pad_token_id", None) or 0
    tokens = torch.arange(sum(_LENGTHS)) % (inner.config.vocab_size - 1)
    ids = (tokens + (tokens >= pad)).to(device)
    start = position_offset(inner)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS]).to(device) + start
    packed = {
        "input_ids": ids[None],
        "position_ids": positions[None],
        "packing": Packing.of(_LENGTHS, device),
    }
    others = torch.arange(_LENGTHS[0], len(ids), device=device)
    parts = ids.split(_LENGTHS)
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence(parts, True, pad),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], True),
    }
    changed = {**packed, "input_ids": ids.index_fill(0, others, int(ids[0]))[None]}
    results = []
    for inputs in (packed, padded, changed):
        with tasks(torch.tensor([0, 0]), lengths=_LENGTHS):
            output = call_model(model, inputs)
        results.append(output if isinstance(output, Tensor) else output.last_hidden_state[:, 0])
    return results
