"""Models of transformers that take packed sequences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
    `Packing` as "packing", as `SequencePasses` makes them. Attention may be full or causal, with a
    sliding window, fewer heads of keys than of queries and softcapped scores.

    After an encoder only the first token of each sequence is used, so the logits are [S, classes].
    A causal model gives its outputs of every token, logits [1, N, vocabulary]; packed, it neither
    makes masks nor fills a cache.

    The model is tried at once: two packed sequences must give the same outputs as padded ones, with
    sliding windows shorter than they are, and neither may change with the other's tokens.

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
    if getattr(inner.config, "vocab_size", None) is None:
        raise ValueError(
            f"enable_packing: {type(inner).__name__} is no model of token sequences: its "
            "configuration has no vocab_size"
        )
    if not inner._can_set_attn_implementation():
        raise ValueError(
            f"enable_packing: {type(inner).__name__} has an attention of its own, not transformers'"
        )
    register()
    base = inner.base_model
    if _is_causal(inner):
        handles = [base.register_forward_pre_hook(_WithoutMask(), with_kwargs=True)]
    else:
        encoder = getattr(base, "encoder", None) or getattr(base, "transformer", None) or base
        handles = _FirstTokens().hook(encoder)
    inner.__dict__[_HANDLES] = inner.config._attn_implementation, handles
    inner.set_attn_implementation(NAME)


def _is_causal(inner: nn.Module) -> bool:
    return any(getattr(module, "is_causal", False) is True for module in inner.modules())


class _WithoutMask:
    """Has a causal model leave out the mask [N, N] and the cache of packed sequences.

    transformers makes no mask where it is given one of four dimensions; `attention` ignores it.
    """

    def __init__(self) -> None:
        register()  # a model may be unpickled where transformers does not know `attention` yet

    def __reduce__(self) -> Any:
        return type(self), ()

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        packing = kwargs.get("packing")
        if packing is None:
            return None
        mask = packing.ends.new_ones(1, 1, 1, 1, dtype=torch.bool)
        return args, {**kwargs, "attention_mask": mask, "use_cache": False}


class _FirstTokens:
    """Hooks that make an encoder give each packed sequence's first token alone, [S, 1, H].

    In a last layer like BERT's all other tokens are dropped right after attention, which saves
    three quarters of that layer; in other models they are dropped after the encoder.
    """

    def __init__(self) -> None:
        self._packing: Packing | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        register()  # see `_WithoutMask`
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
    return hidden[0].index_select(0, packing.ends[:-1])[:, None]


def _difference(model: nn.Module) -> str | None:
    """How the model's outputs for packed sequences are wrong; None if they are right."""
    inner = _transformer("enable_packing", model)
    kind = type(inner).__name__
    try:
        with evaluation_mode(model), _short_windows(model):
            for part in dict.fromkeys((inner.base_model, model)):
                problem = _trial(part, inner).problem()
                if problem is not None:
                    return f"{kind} {problem}"
    except Exception as problem:
        return f"{kind} does not take packed sequences: {first_line(problem)}"
    return None


@contextmanager
def _short_windows(model: nn.Module) -> Iterator[None]:
    """Makes sliding windows and chunks shorter than the sequences that a model is tried with."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    found = [
        (owner, name, value)
        for owner in (*model.modules(), *configs.values())
        for name in ("sliding_window", "attention_chunk_size")
        if type(value := vars(owner).get(name)) is int
    ]
    try:
        for owner, name, value in found:
            setattr(owner, name, min(value, 2))
        yield
    finally:
        for owner, name, value in found:
            setattr(owner, name, value)


@dataclass(frozen=True)
class _Trial:
    """Outputs of a model for two sequences.

    Attributes:
        packed, padded: [S, ...] of the first tokens, or [N, ...] of all tokens of a causal model.
        changed: those of packed sequences, with other tokens in the first, and in the second.
        first: how many outputs are of the first sequence.
        rounding: how far the outputs of a sequence may change with the other's tokens, relative to
            the largest: not at all but in mixtures of experts, where a token is multiplied in one
            product with whatever others its expert gets.
    """

    packed: Tensor
    padded: Tensor
    changed: tuple[Tensor, Tensor]
    first: int
    rounding: float

    def problem(self) -> str | None:
        """What is wrong with the packed outputs, after the model's name; None if they are right."""
        packed, padded, first = self.packed, self.padded, self.first
        if packed.shape != padded.shape:
            return (
                f"gives {list(packed.shape)} instead of {list(padded.shape)} for packed sequences"
            )
        largest = padded.abs().max()
        after, before = self.changed
        changes = torch.cat([before[:first] - packed[:first], after[first:] - packed[first:]])
        if not bool((changes.abs() <= self.rounding * largest).all()):
            return "lets packed sequences see each other"
        limit = (5e-2 if padded.dtype in SHORT else 5e-3) * largest
        if not bool(((packed - padded).abs() <= limit).all()):
            return "gives other outputs for packed sequences"
        return None


def _trial(model: nn.Module, inner: Any) -> _Trial:
    device = next(model.parameters()).device
    pad = getattr(inner.config, "pad_token_id", None) or 0
    tokens = torch.arange(sum(_LENGTHS)) % (inner.config.vocab_size - 1)
    ids = (tokens + (tokens >= pad)).to(device)
    start = position_offset(inner)
    positions = torch.cat([torch.arange(n) for n in _LENGTHS]).to(device) + start
    packed = {"position_ids": positions[None], "packing": Packing.of(_LENGTHS, device)}
    parts = ids.split(_LENGTHS)
    padded = {
        "input_ids": nn.utils.rnn.pad_sequence(parts, True, pad),
        "attention_mask": nn.utils.rnn.pad_sequence([torch.ones_like(p) for p in parts], True),
    }
    real = padded["attention_mask"].bool()
    causal = _is_causal(inner)

    def outputs(inputs: dict[str, Any]) -> Tensor:
        with tasks(torch.tensor([0, 0]), lengths=_LENGTHS):
            found = call_model(model, inputs)
        every = found if isinstance(found, Tensor) else found.last_hidden_state
        if causal:
            size = inputs["input_ids"].shape
            if every.shape[:2] != size:
                raise ValueError(
                    f"a causal model must give outputs of every token, {list(size)} of them, got "
                    f"{list(every.shape)}"
                )
            return every[real] if inputs is padded else every.flatten(0, 1)
        return every if isinstance(found, Tensor) else every[:, 0]

    def of_packed(*of_each: Tensor) -> Tensor:
        return outputs({**packed, "input_ids": torch.cat(of_each)[None]})

    one, two = parts
    ours = of_packed(one, two)
    experts = any(name.endswith("experts") for name, _ in inner.named_modules())
    return _Trial(
        ours,
        outputs(padded),
        (
            of_packed(torch.full_like(one, int(two[0])), two),
            of_packed(one, torch.full_like(two, int(one[0]))),
        ),
        _LENGTHS[0] if causal else 1,
        16 * torch.finfo(ours.dtype).eps if experts else 0.0,
    )
