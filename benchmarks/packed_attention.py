"""Times `packed_attention`, attention within sequences of unequal length, beside plain PyTorch.

python -m benchmarks.packed_attention [--device cuda] [--write DIR]

Times are relative to products and softmax in plain PyTorch, one sequence after the other. torch's
own attention is measured in the same way where there is no dropout: its mask cannot be drawn again,
so with dropout there would be nothing to compare it with. Causal cases have four heads of queries
to one of keys.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.cases import Benchmark
from benchmarks.lib.dialogues import drawn
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import SEED, Function, Setup, TensorCase
from metalora import ops, reference


def _torch(setup: Setup) -> Function:
    lengths = list(setup.case.lengths)
    causal, group = setup.case.causal, setup.case.heads // setup.case.key_heads

    def attention(query: Tensor, *keys: Tensor) -> Tensor:
        rows = query, *(part.repeat_interleave(group, 1) if group > 1 else part for part in keys)
        parts = zip(*(part.transpose(0, 1).split(lengths, 1) for part in rows), strict=True)
        found = [F.scaled_dot_product_attention(q, k, v, is_causal=causal) for q, k, v in parts]
        return torch.cat(found, 1).transpose(0, 1)

    return attention


def _plain(setup: Setup) -> Function:
    return lambda *rows: setup.case.exact("plain", *rows)


def _metalora(setup: Setup) -> Function:
    case, ends = setup.case, setup.case.ends()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        p, seed = case.dropout, setup.seed
        return ops.packed_attention(
            query, key, value, ends, dropout_p=p, seed=seed, causal=case.causal
        )

    return attention


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {
    "plain": _plain,
    "metalora": _metalora,
    "torch": _torch,
}


@dataclass(frozen=True)
class AttentionCase(TensorCase):
    """Sequences of these lengths, one behind the other."""

    lengths: tuple[int, ...]
    heads: int
    d: int
    dropout: float
    key_heads: int
    causal: bool = False

    functions = FUNCTIONS

    def ends(self) -> Tensor:
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        queries, keys = (
            (sum(self.lengths), heads, self.d) for heads in (self.heads, self.key_heads)
        )
        return {"query": queries, "key": keys, "value": keys, "grad": queries}

    def offered(self, names: Sequence[str]) -> list[str]:
        return [name for name in names if name != "torch" or not self.dropout]

    def exact(self, version: str, *rows: Tensor, **named: Tensor) -> Tensor:
        query, key, value = rows or named.values()
        seed = torch.tensor(SEED, device=query.device)
        scale, ends = self.d**-0.5, self.ends()
        window = sum(self.lengths) if self.causal else 0
        return reference.packed_attention(
            query, key, value, ends, scale, self.dropout, seed, window
        )

    def shrunk(self) -> AttentionCase:
        return replace(self, lengths=(5, 3, 9))


def _dialogues(turns: int) -> tuple[int, ...]:
    lengths = drawn(4, 1000).sequences.lengths
    chosen = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1))[:turns]
    return tuple(lengths[chosen].flatten().tolist())


# Sequences, the number of heads, and features of a head: those of MiniLM and of RoBERTa-base.
SIZES = {
    "cpu": (("80 × 48", (48,) * 80), ("ConvAI2", _dialogues(4))),
    "cuda": (("640 × 48", (48,) * 640), ("ConvAI2", _dialogues(32))),
}
CAUSAL = (("16 × 256", (256,) * 16), ("4 × 1024", (1024,) * 4), ("ConvAI2", _dialogues(4)))
BENCHMARK = Benchmark(
    "packed_attention",
    "Attention within sequences, forward + backward",
    tuple(
        AttentionCase("packed_attention", group, f"{name} h12 d{d} p{p:g}", lengths, 12, d, p, 12)
        for group, sizes in SIZES.items()
        for name, lengths in sizes
        for d in (32, 64)
        for p in (0.0, 0.1)
    )
    + tuple(
        AttentionCase(
            *("packed_attention", "cpu", f"{name} causal h8/2 d64", lengths, 8, 64, 0.0, 2, True)
        )
        for name, lengths in CAUSAL
    ),
    {"all": tuple(FUNCTIONS)},
    floor="plain",
    precisions=("fp32", "bf16"),
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
