"""From numbered samples to what a model takes: packed, or padded to similar lengths."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from metalora._checks import check_count
from metalora.hf.attention import Packing, to_device
from metalora.hf.sequences import Sequences
from metalora.meta.causal import IGNORED
from metalora.meta.data import Batch
from metalora.nn.task_batch import with_parts


class SequencePasses:
    """A ``collate`` (see `metalora.meta.Batch`) for batches whose inputs are samples' numbers.

    Packed, samples come in the order of their tasks, one behind the other without padding: inputs
    "input_ids" and "position_ids" [1, N] and "packing", for models after `enable_packing`. Padded,
    samples of similar length come together, the sequences [b·n, L] padded to the longest, for any
    model. All planning is done on the host, which never waits for the device.

    Args:
        sequences: of all samples; the tokens are moved to ``device`` at once.
        packed: whether samples are packed.
        max_tokens: tokens in a pass, padding included; a sample that has more comes alone.
        pad_token_id: the token to pad with.
        position_offset: the position of a sequence's first token, see `position_offset`.
        device: where the model is.

    Attributes:
        tokens: how many tokens were given out.
        padding: how many padding tokens beside them.
    """

    def __init__(
        self,
        sequences: Sequences,
        *,
        packed: bool,
        max_tokens: int,
        pad_token_id: int,
        position_offset: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.packed = packed
        self.max_tokens = check_count("SequencePasses", "max_tokens", max_tokens)
        self.pad_token_id = check_count("SequencePasses", "pad_token_id", pad_token_id, 0)
        self.position_offset = check_count("SequencePasses", "position_offset", position_offset, 0)
        self.device = torch.device(device)
        self.tokens = self.padding = 0
        self._fields = {name: part.to(self.device) for name, part in sequences.fields.items()}
        self._lengths = sequences.lengths  # [samples, n]
        self._starts = sequences.starts[:-1].view_as(self._lengths)

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """The passes of a batch whose inputs are int64 [B] on the CPU, each sorted by task."""
        samples, ids = _checked(batch.inputs), batch.task_ids.cpu()
        lengths = self._lengths[samples]
        if self.packed:
            order = torch.argsort(ids, stable=True)
            sizes = _even_runs(lengths[order].sum(1), self.max_tokens)
        else:
            order = torch.argsort(lengths.amax(1), descending=True, stable=True)
            sizes = _padded_runs(lengths[order], self.max_tokens)
        for rows in order.split(sizes):
            rows = rows[torch.argsort(ids[rows], stable=True)]
            weights = batch.weights
            yield Batch(
                self._packed(samples[rows]) if self.packed else self._padded(samples[rows]),
                self._take(batch.targets, rows),
                with_parts(ids[rows], lengths.shape[1]),
                tuple(torch.bincount(ids[rows]).tolist()),
                lengths=tuple(lengths[rows].sum(1).tolist()) if self.packed else None,
                weights=None if weights is None else self._take(weights, rows),
                sizes=None if batch.sizes is None else self._take(batch.sizes, rows),
                places=None if batch.places is None else batch.places[rows],
                weighting=batch.weighting,
            )

    def _take(self, values: Tensor, rows: Tensor) -> Tensor:
        return to_device(values[rows.to(values.device)], self.device)

    def _packed(self, samples: Tensor) -> dict[str, Any]:
        lengths = self._lengths[samples].flatten()
        before = lengths.cumsum(0) - lengths
        first = self._starts[samples].flatten()
        total = int(lengths.sum())
        self.tokens += total
        packing = Packing.of(lengths.tolist(), self.device)
        moved = to_device(torch.stack([first - before, before, lengths]), self.device)
        shift, before = moved[:2].repeat_interleave(moved[2], dim=1, output_size=total)
        tokens = torch.arange(total, device=self.device)
        inputs = {name: part[tokens + shift].long()[None] for name, part in self._fields.items()}
        positions = tokens - before + self.position_offset
        return {**inputs, "position_ids": positions[None], "packing": packing}

    def _padded(self, samples: Tensor) -> dict[str, Any]:
        lengths = self._lengths[samples].flatten()
        longest, total = int(lengths.max()), int(lengths.sum())
        self.tokens += total
        self.padding += longest * len(lengths) - total
        moved = torch.stack([self._starts[samples].flatten(), lengths])
        first, lengths = to_device(moved, self.device)[..., None]
        place = torch.arange(longest, device=self.device)
        real = place < lengths  # [b·n, L]
        places = torch.where(real, first + place, 0)
        pads = {"input_ids": self.pad_token_id, "labels": IGNORED}
        inputs = {
            name: torch.where(real, part[places].long(), pads.get(name, 0))
            for name, part in self._fields.items()
        }
        return {**inputs, "attention_mask": real.long()}


def _checked(inputs: Any) -> Tensor:
    if not isinstance(inputs, Tensor) or inputs.dtype != torch.int64 or inputs.dim() != 1:
        raise TypeError(
            "SequencePasses: a batch's inputs must be the numbers of its samples, int64 [B], got "
            f"{type(inputs).__name__}"
        )
    if inputs.device.type != "cpu":
        raise ValueError(
            "SequencePasses: a batch's inputs must be on the CPU, where passes are planned, got "
            f"them on {inputs.device}; give the loader tensors on the CPU"
        )
    return inputs


def _even_runs(costs: Tensor, limit: int) -> list[int]:
    """Sizes of the fewest runs of about equal cost, each at most ``limit`` if no sample is more."""
    limit = max(limit, int(costs.max()))
    middle, total = costs.cumsum(0) - costs // 2, int(costs.sum())
    for count in range(-(-total // limit), len(costs)):
        runs = (middle * count // total).clamp(max=count - 1)
        if int(torch.zeros(count, dtype=torch.int64).index_add(0, runs, costs).max()) <= limit:
            return [size for size in torch.bincount(runs).tolist() if size]
    return [1] * len(costs)


def _padded_runs(lengths: Tensor, limit: int) -> list[int]:
    """Sizes of runs of samples [B, n], longest first, of at most ``limit`` tokens when padded."""
    per_sample, sizes, start = lengths.shape[1], [], 0
    longest = lengths.amax(1).tolist()
    while start < len(longest):
        size = max(1, limit // (per_sample * longest[start]))
        sizes.append(min(size, len(longest) - start))
        start += size
    return sizes
