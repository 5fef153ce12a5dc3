"""Attention in packed sequences: a token sees those of its own sequence, and no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from metalora import ops
from metalora._checks import SHORT
from metalora.nn import sample_seeds
from metalora.reference.packed_attention import seen_keys

NAME = "metalora"
"""What transformers calls `attention`."""

_BLOCKS = 4  # kernels are launched per block; this many leave about an eighth of padding


@dataclass(frozen=True, eq=False)
class Packing:
    """Where each sequence lies in a row of concatenated tokens.

    Attributes:
        ends: int32 [S + 1]: tokens ``ends[i]:ends[i + 1]`` are sequence i.
        longest: how many tokens the longest has.
        blocks: on a GPU where its kernel for packed sequences cannot be had, attention runs block
            by block. A block has b sequences of the common length L and a mask [b, 1, 1, L], False
            for padding; None if there is no padding. Empty where blocks are not needed.
        places: int64 [N], the place of each token in the blocks; None without blocks.
    """

    ends: Tensor
    longest: int
    blocks: tuple[tuple[int, int, Tensor | None], ...] = ()
    places: Tensor | None = None

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device, *, padded: bool | None = None
    ) -> Packing:
        """The packing of sequences that have these ``lengths``, none 0.

        Args:
            lengths: S numbers, at least one.
            device: where the tokens are.
            padded: whether there are blocks of several sequences, padded to one length. None: on
                every device but a CPU, for which `metalora.ops.packed_attention` is native.
        """
        if padded is None:
            padded = device.type != "cpu"
        host = torch.tensor(lengths)
        ends = torch.cat([host.new_zeros(1), host.cumsum(0)])
        if not padded:
            return cls(to_device(ends.int(), device), max(lengths))
        order = host.argsort(descending=True, stable=True)
        ordered = host[order]
        before = ordered.cumsum(0) - ordered  # a block for each equal share of the tokens
        sizes = torch.bincount(before * _BLOCKS // int(ends[-1])).tolist()
        parts = [part for part in ordered.split(sizes) if len(part)]
        blocks, place = [], 0
        first = torch.empty_like(host)  # where in the blocks each sequence starts
        for part, sequences in zip(parts, order.split([len(part) for part in parts]), strict=True):
            size, length = len(part), int(part[0])
            first[sequences] = place + torch.arange(size) * length
            place += size * length
            mask = None
            if int(part[-1]) < length:
                tokens = torch.arange(length, device=device)
                mask = (tokens < to_device(part, device)[:, None])[:, None, None]
            blocks.append((size, length, mask))
        shift, counts = to_device(torch.stack([first - ends[:-1], host]), device)
        tokens = torch.arange(int(ends[-1]), device=device)
        shift = torch.repeat_interleave(shift, counts, output_size=len(tokens))
        return cls(to_device(ends.int(), device), max(lengths), tuple(blocks), tokens + shift)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``, made without waiting on the host."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@torch.compiler.disable  # a loop over sequences, which would be compiled for their lengths
def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    dropout: float = 0.0,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(s · q kᵀ) v within each sequence.

    On a CPU `metalora.ops.packed_attention`. On a GPU in bf16 or fp16 without dropout and softcap,
    torch's kernel for packed sequences; otherwise torch's attention, block by block. With dropout
    inside `metalora.nn.sample_dropout` the former everywhere, with a seed for each sequence.

    Args:
        query: [1, heads, N, d].
        key, value: [1, key_heads, N, d], of which heads is a multiple.
        packing: of the N tokens.
        dropout: probability to drop an attention weight.
        scale: s; None means 1 / sqrt(d).
        causal, window, softcap: see `metalora.ops.packed_attention`.

    Returns:
        [1, N, heads, d].
    """
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))  # [N, heads, d]
    if window is not None and window >= packing.longest:
        window = None  # nothing is hidden by it
    places, seeds = packing.places, None
    if dropout > 0:
        seeds = sample_seeds(len(packing.ends) - 1, query.device)
    if seeds is not None or (places is None and not query.is_cuda):
        return ops.packed_attention(
            q, k, v, packing.ends.cpu(), scale=scale, dropout_p=dropout, seed=seeds, causal=causal,
            window=window, softcap=softcap,
        )[None]  # fmt: skip
    k, v = _repeated(k, q.shape[1]), _repeated(v, q.shape[1])
    if dropout == 0 and softcap is None and _has_kernel(query):
        ends, longest = packing.ends, packing.longest
        before = -1 if window is None else window - 1
        sides: dict[str, Any] = {"window_size": (before, 0)} if causal else {}
        output: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scale, **sides)
        return output[None]
    assert places is not None
    rows = [q, k, v]
    sizes = [size * length for size, length, _ in packing.blocks]
    rows = [p.new_zeros(sum(sizes), *p.shape[1:]).index_copy(0, places, p) for p in rows]
    parts = zip(*(part.split(sizes) for part in rows), strict=True)
    outputs = []
    for (size, length, mask), of_block in zip(packing.blocks, parts, strict=True):
        q, k, v = (part.unflatten(0, (size, length)).transpose(1, 2) for part in of_block)
        if causal:  # padding stands behind all tokens, which do not see it
            mask = None if window is None else seen_keys(length, window, query.device)
        if softcap is None:
            first = causal and window is None
            output = F.scaled_dot_product_attention(
                q, k, v, mask, dropout_p=dropout, scale=scale, is_causal=first
            )
        else:
            if causal and mask is None:
                mask = seen_keys(length, length, query.device)
            output = _capped_attention(q, k, v, mask, dropout, scale, softcap)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return _Pick.apply(torch.cat(outputs), places)[None]


def _repeated(part: Tensor, heads: int) -> Tensor:
    """[_, key_heads, ...] → [_, heads, ...]: each head several times, one beside the other."""
    group = heads // part.shape[1]
    return part if group == 1 else part.repeat_interleave(group, 1)


def _capped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    scale: float | None,
    softcap: float,
) -> Tensor:
    """torch's scaled_dot_product_attention of [b, heads, L, d] with scores c · tanh(x / c)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = softcap * torch.tanh(scale * query @ key.mT / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    long = torch.float32 if scores.dtype in SHORT else scores.dtype
    weights = F.dropout(torch.softmax(scores, -1, dtype=long).to(value.dtype), dropout)
    return weights @ value


def _has_kernel(query: Tensor) -> bool:
    """Whether torch's attention for packed sequences takes such tensors."""
    if not query.is_cuda or query.dtype not in SHORT:
        return False
    fits = query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    return fits and torch.cuda.get_device_capability(query.device) >= (8, 0)


class _Pick(torch.autograd.Function):
    """rows[places], whose gradient is copied to the places, where torch would scatter-add."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = rows.shape[0]
        return rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, *grad.shape[1:]).index_copy(0, places, grad), None


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, or with ``packing`` that of packed sequences.

    Unlike "sdpa" it has a softcap too.
    """
    if packing is None:
        return _padded_attention(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    window, causal = kwargs.get("sliding_window"), kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    special = [name for name in _NOT_PACKED if kwargs.get(name) is not None]
    if window is not None and not causal:
        special.append("sliding_window in both directions")
    if special:
        raise ValueError(
            f"attention: packed sequences have none with {' and '.join(special)}, which "
            f"{type(module).__name__} asks for"
        )
    output = packed_attention(
        query, key, value, packing, dropout=dropout, scale=scaling, causal=causal, window=window,
        softcap=kwargs.get("softcap"),
    )  # fmt: skip
    return output, None


_NOT_PACKED = ("position_bias", "s_aux")  # biases of the scores, and attention sinks


def _padded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa" attention, with a softcap where the model has one."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if softcap is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    length, heads = query.shape[2], query.shape[1]
    key, value = _repeated(key, heads), _repeated(value, heads)
    if attention_mask is None and length > 1:  # what "sdpa" takes for a causal mask
        attention_mask = seen_keys(length, length, query.device)
        key, value = key[:, :, :length], value[:, :, :length]
    output = _capped_attention(query, key, value, attention_mask, dropout, scaling, softcap)
    return output.transpose(1, 2).contiguous(), None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """transformers' "sdpa" mask. Skips the all-true mask check, which synchronises the device."""
    from transformers.masking_utils import sdpa_mask

    mask = kwargs.get("attention_mask")
    if mask is not None:
        kwargs["allow_is_bidirectional_skip"] = False
        if mask.is_cuda:
            kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def register() -> None:
    """Makes `attention` known to transformers as `NAME`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, _mask)
