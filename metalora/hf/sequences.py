"""Token sequences of unequal length, as one tensor per field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from metalora._checks import check_count, check_tensor


@dataclass(frozen=True, eq=False)
class Sequences:
    """Token sequences one behind the other, several of which make a sample.

    Attributes:
        fields: what there is of every token, int32 or int64 [number of tokens] each: "input_ids",
            and others that the model takes, such as "token_type_ids".
        starts: int64 [S + 1] on the CPU: tokens ``starts[i]:starts[i + 1]`` are sequence i, at
            least one.
        per_sample: n; sequences ``i * n`` to ``(i + 1) * n - 1`` are sample i.

    Raises:
        TypeError: if a tensor is none, or of another dtype.
        ValueError: if shapes do not fit together, or a sequence is empty.
    """

    fields: Mapping[str, Tensor]
    starts: Tensor
    per_sample: int = 1

    def __post_init__(self) -> None:
        check_count("Sequences", "per_sample", self.per_sample)
        _check("starts", self.starts, (torch.int64,))
        if "input_ids" not in self.fields:
            raise ValueError(f"Sequences: fields must have 'input_ids', got {list(self.fields)}")
        if self.starts.device.type != "cpu":
            raise ValueError(f"Sequences: starts must be on the CPU, got {self.starts.device}")
        count = len(self.starts) - 1
        if count < 0 or int(self.starts[0]) != 0 or bool((self.starts.diff() < 1).any()):
            raise ValueError("Sequences: starts must be [S + 1], start at 0 and ascend strictly")
        if count % self.per_sample != 0:
            raise ValueError(
                f"Sequences: starts must be of {self.per_sample} sequences per sample, got {count} "
                "sequences"
            )
        for name, tokens in self.fields.items():
            _check(f"fields[{name!r}]", tokens, (torch.int32, torch.int64))
            if len(tokens) != int(self.starts[-1]):
                raise ValueError(
                    f"Sequences: fields[{name!r}] must have as many tokens as starts says, "
                    f"{int(self.starts[-1])}, got {len(tokens)}"
                )

    def __len__(self) -> int:
        """Number of samples."""
        return (len(self.starts) - 1) // self.per_sample

    @property
    def lengths(self) -> Tensor:
        """int64 [samples, n]: how many tokens each sequence has."""
        return self.starts.diff().view(-1, self.per_sample)

    def take(self, samples: Tensor) -> Sequences:
        """The sequences of some samples, int64 [m], in that order."""
        lengths = self.lengths[samples].flatten()
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        first = self.starts[:-1].view(-1, self.per_sample)[samples].flatten()
        tokens = torch.arange(int(starts[-1])) + (first - starts[:-1]).repeat_interleave(lengths)
        fields = {name: every[tokens.to(every.device)] for name, every in self.fields.items()}
        return Sequences(fields, starts, self.per_sample)


def _check(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    check_tensor("Sequences", name, value)
    if value.dtype not in dtypes or value.dim() != 1:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"Sequences: {name} must be {wanted} with one dimension, got {value.dtype} "
            f"{list(value.shape)}"
        )
