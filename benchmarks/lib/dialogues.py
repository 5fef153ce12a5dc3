"""Dialogues to measure on, drawn with the lengths of ConvAI2's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.language.data import load
from experiments.language.encoders import has_token_types, max_length
from experiments.language.tokens import tokenize
from metalora.hf import Sequences

CANDIDATES, DIALOGUES, SPECIAL = 20, 20, 4  # of a turn, a task, and a sequence
# Quantiles over ConvAI2's validation dialogues: RoBERTa's tokens of an utterance, and exchanges of
# a dialogue.
AT = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1.0)
UTTERANCE = (3, 5, 5, 6, 9, 12, 15, 18, 19, 21, 29)
EXCHANGES = (7, 7, 7, 7, 7.5, 8, 8, 8, 8, 9, 13)


@dataclass(frozen=True)
class Turns:
    """Turns of dialogues, in each of which one candidate is the true next utterance.

    Attributes:
        sequences: the history of every turn with each of its candidates.
        answers: int64 [turns], the true candidate.
        task_ids: int64 [turns].
        source: the origin of the dialogues, for titles.
    """

    sequences: Sequences
    answers: Tensor
    task_ids: Tensor
    source: str

    @property
    def longest(self) -> list[int]:
        """Tokens of the longest sequence of each task."""
        lengths, tasks = self.sequences.lengths, range(int(self.task_ids.max()) + 1)
        return [int(lengths[self.task_ids == t].max()) for t in tasks]


def drawn(num_tasks: int, vocab_size: int, seed: int = 0, candidates: int = CANDIDATES) -> Turns:
    """Tasks of 20 dialogues each with random tokens and lengths like ConvAI2's.

    A history is everything said before, so it grows by two utterances from turn to turn; each of a
    turn's candidates, 20 in ConvAI2, is an utterance.
    """
    generator = torch.Generator().manual_seed(seed)

    def lengths(quantiles: tuple[float, ...], *shape: int) -> Tensor:
        at, values = torch.tensor(AT), torch.tensor(quantiles, dtype=torch.float32)
        u = torch.rand(shape, generator=generator)
        right = torch.searchsorted(at, u).clamp_min(1)
        part = (u - at[right - 1]) / (at[right] - at[right - 1])
        return torch.lerp(values[right - 1], values[right], part).round().long()

    sizes, task_ids = [], []
    for task in range(num_tasks):
        for exchanges in lengths(EXCHANGES, DIALOGUES).tolist():
            said = lengths(UTTERANCE, 2 * exchanges - 1).cumsum(0)[::2]  # at each of the turns
            sizes.append(SPECIAL + said[:, None] + lengths(UTTERANCE, exchanges, candidates))
            task_ids += [task] * exchanges
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cat(sizes).flatten().cumsum(0)])
    tokens = torch.randint(5, vocab_size, (int(starts[-1]),), generator=generator)
    answers = torch.randint(candidates, (len(task_ids),), generator=generator)
    sequences = Sequences({"input_ids": tokens}, starts, candidates)
    return Turns(sequences, answers, torch.tensor(task_ids), "lengths drawn like ConvAI2's")


def read(root: Path, model: Any, tokenizer: Any, num_tasks: int) -> Turns:
    """The retraining tasks of `experiments.language`."""
    corpus = load(root, tasks=num_tasks)
    turns = tokenize(
        [task.train for task in corpus.retraining],
        tokenizer,
        max_length=max_length(model),
        token_types=has_token_types(model, tokenizer),
    )
    sequences = Sequences(turns.fields, turns.starts, turns.per_turn)
    return Turns(sequences, turns.answers, turns.task_ids, f"dialogues of {root.name}")
