"""Dialogues as token sequences: one for each (history, candidate) pair, made once and cached.

The cache is a folder with one file for each key, whose checksum is verified when it is read.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.language.dialogues import SILENCE, Dialogue
from metalora._files import cache_folder, read_tensors, replacing
from metalora.meta.identity import digest_of_tensors

FORM = 1  # part of the cache's key; increase it when the same input gives other sequences
AT_ONCE = 1 << 15  # sequences assembled at a time, which bounds the memory of their indices


@dataclass(frozen=True)
class TokenizedTurns:
    """Every turn's candidates as token sequences, one after the other.

    Attributes:
        fields: "input_ids" and, where asked for, "token_type_ids", both int32 [total].
        starts: int64 [S + 1]; sequence i is ``starts[i]`` to ``starts[i + 1]``.
        answers: int64 [N], which of its candidates is the true one.
        task_ids: int64 [N], ascending.
        per_turn: n candidates; turn i has the sequences i·n to (i+1)·n - 1, so S = N·n.
        truncated: number of turns with a sequence that was too long and lost tokens.
    """

    fields: Mapping[str, Tensor]
    starts: Tensor
    answers: Tensor
    task_ids: Tensor
    per_turn: int
    truncated: int

    def __len__(self) -> int:
        return self.answers.shape[0]

    @property
    def tokens(self) -> int:
        """Returns the number of tokens of all sequences together."""
        return int(self.starts[-1])


def tokenize(
    tasks: Sequence[Sequence[Dialogue]],
    tokenizer: Any,
    *,
    max_length: int,
    token_types: bool,
    history: int | None = None,
    cache: Path | None = None,
) -> TokenizedTurns:
    """Makes the token sequences of every turn, or reads them from the cache.

    The history of a turn is all that was said before the response, silence left out; each
    utterance is tokenised by itself, after a space unless it is the dialogue's first. With ``cls``
    and ``sep`` as the tokenizer has them (RoBERTa: ``<s>`` and ``</s>``) a sequence is

        token_types=False: cls history sep cls candidate sep
        token_types=True:  cls history sep candidate sep, where candidate and its sep are type 1

    A sequence longer than ``max_length`` loses tokens on the history's left; a candidate that is
    too long by itself loses them on its right.

    Args:
        tasks: each task's dialogues; their place is the task id.
        tokenizer: a fast tokenizer of transformers, see ``encoders.load_tokenizer``.
        max_length: of a sequence, see ``encoders.max_length``.
        token_types: see ``encoders.has_token_types``.
        history: keep only the last so many utterances; None keeps all.
        cache: folder of the cache; None is `metalora._files.cache_folder`.

    Raises:
        ValueError: there are no turns, turns with different numbers of candidates, or
            ``max_length`` leaves no room for a candidate.
    """
    turns = [turn for dialogues in tasks for d in dialogues for turn in d.turns]
    counts = {len(turn.candidates) for turn in turns}
    if len(counts) != 1:
        raise ValueError(
            "tokenize: tasks must have turns, all with as many candidates, "
            f"got {len(turns)} turns with {sorted(counts)} candidates"
        )
    special = 3 if token_types else 4
    if max_length <= special:
        raise ValueError(f"tokenize: max_length must be above {special}, got {max_length}")
    (per_turn,) = counts
    settings = [FORM, max_length, token_types, history]
    key = _key(tasks, tokenizer, settings)
    folder = cache_folder() if cache is None else cache
    tensors = _read(folder, key)
    if tensors is None:
        tensors = _assemble(_Pieces(tasks, tokenizer, history), tokenizer, max_length, token_types)
        write(folder, key, tensors)
    per_task = torch.tensor([sum(len(d.turns) for d in dialogues) for dialogues in tasks])
    return TokenizedTurns(
        {name: tensors[name] for name in ("input_ids", "token_type_ids") if name in tensors},
        tensors["starts"],
        torch.tensor([turn.answer for turn in turns]),
        torch.arange(len(tasks)).repeat_interleave(per_task),
        per_turn,
        int(tensors["truncated"]),
    )


class _Pieces:
    """The tokens of all texts, and which of them make up each history and each candidate.

    Attributes:
        stream: int32, the tokens of all utterances of all dialogues, one after the other.
        history_start, history_end: int64 [N], each turn's history in ``stream``.
        tokens: int32, the tokens of all different texts, one after the other.
        text_start, text_length: int64 [texts], each text in ``tokens``.
        choices: int64 [N, n], each turn's candidates by text.
    """

    def __init__(
        self, tasks: Sequence[Sequence[Dialogue]], tokenizer: Any, history: int | None
    ) -> None:
        texts: dict[str, int] = {}
        spoken: list[int] = []  # the utterances of all dialogues, by text
        first: list[int] = []  # of each turn: where in ``spoken`` its history begins and ends
        behind: list[int] = []
        choices: list[list[int]] = []
        for dialogue in (d for dialogues in tasks for d in dialogues):
            begin = len(spoken)

            def say(text: str, begin: int = begin) -> None:
                spaced = text if len(spoken) == begin else f" {text}"
                spoken.append(texts.setdefault(spaced, len(texts)))

            for turn in dialogue.turns:
                if turn.utterance != SILENCE:
                    say(turn.utterance)
                first.append(begin if history is None else max(begin, len(spoken) - history))
                behind.append(len(spoken))
                choices.append([texts.setdefault(c, len(texts)) for c in turn.candidates])
                say(turn.response)
        encoded = _encode(list(texts), tokenizer)
        self.text_length = np.array([len(ids) for ids in encoded], dtype=np.int64)
        self.text_start = np.cumsum(self.text_length) - self.text_length
        self.tokens = np.array([i for ids in encoded for i in ids], dtype=np.int32)
        order = np.array(spoken, dtype=np.int64)
        self.stream = self.tokens[_ranges(self.text_start[order], self.text_length[order])]
        offsets = np.concatenate([[0], np.cumsum(self.text_length[order])])
        self.history_start, self.history_end = offsets[first], offsets[behind]
        self.choices = np.array(choices, dtype=np.int64)


def _encode(texts: Sequence[str], tokenizer: Any) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def _assemble(
    pieces: _Pieces, tokenizer: Any, max_length: int, token_types: bool
) -> dict[str, Tensor]:
    turns, count = pieces.choices.shape
    text = pieces.choices.reshape(-1)
    room = max_length - (3 if token_types else 4)
    history_end = pieces.history_end.repeat(count)
    history_full = history_end - pieces.history_start.repeat(count)
    candidate_full = pieces.text_length[text]
    candidate = np.minimum(candidate_full, room)
    history = np.minimum(history_full, room - candidate)
    cut = (history < history_full) | (candidate < candidate_full)
    lengths = history + candidate + (max_length - room)
    starts = np.concatenate([[0], np.cumsum(lengths)])

    # Every position that is not written below stays a sep.
    ids = np.full(starts[-1], tokenizer.sep_token_id, dtype=np.int32)
    ids[starts[:-1]] = tokenizer.cls_token_id
    candidate_start = starts[1:] - 1 - candidate
    if not token_types:
        ids[candidate_start - 1] = tokenizer.cls_token_id
    types = np.zeros(starts[-1] if token_types else 0, dtype=np.int32)
    for begin in range(0, len(text), AT_ONCE):
        part = slice(begin, begin + AT_ONCE)
        n = history[part]
        ids[_ranges(starts[:-1][part] + 1, n)] = pieces.stream[_ranges(history_end[part] - n, n)]
        n, to = candidate[part], candidate_start[part]
        ids[_ranges(to, n)] = pieces.tokens[_ranges(pieces.text_start[text[part]], n)]
        if token_types:
            types[_ranges(to, n + 1)] = 1
    made = {
        "input_ids": ids,
        "starts": starts,
        "truncated": np.array(cut.reshape(turns, count).any(1).sum()),
    }
    if token_types:
        made["token_type_ids"] = types
    return {name: torch.from_numpy(array) for name, array in made.items()}


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., starts[0] + lengths[0] - 1, starts[1], ..."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])


def _key(tasks: Sequence[Sequence[Dialogue]], tokenizer: Any, settings: Sequence[Any]) -> str:
    """Returns the sha256 of all that the sequences depend on: texts, tokenizer, settings."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # The last call left these behind; the sequences do not depend on them.
    del backend["padding"], backend["truncation"]
    special = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    texts = [
        [[[t.utterance, t.response, t.candidates] for t in d.turns] for d in dialogues]
        for dialogues in tasks
    ]
    described = json.dumps([settings, special, backend, texts])
    return hashlib.sha256(described.encode()).hexdigest()


def _read(folder: Path, key: str) -> dict[str, Tensor] | None:
    """Returns the tensors under a key; None if there are none or, with a note, if damaged."""
    path = _path(folder, key)
    try:
        tensors, facts = read_tensors(path, "language")
        if facts == {"key": key, "sha256": digest_of_tensors(tensors)}:
            return tensors
    except FileNotFoundError:
        return None
    except (ImportError, MemoryError):
        raise
    except Exception:  # of any kind where the file is damaged, see `read_tensors`
        pass
    print(f"note: {path} is damaged; its sequences are made again", file=sys.stderr)
    return None


def write(folder: Path, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Stores tensors under a key: another process sees all of them or nothing.

    If the folder cannot be written to, a note on stderr says so.
    """
    from safetensors.torch import save

    data = save(dict(tensors), {"key": key, "sha256": digest_of_tensors(tensors)})
    try:
        with replacing(_path(folder, key)) as file:
            file.write(data)
    except OSError as error:
        print(
            f"note: the sequences are not kept: cannot write to {folder} ({error}); "
            "set METALORA_CACHE to another folder",
            file=sys.stderr,
        )


def _path(folder: Path, key: str) -> Path:
    return folder / f"turns-{key[:32]}.safetensors"
