"""Text as token sequences, and the tokenizers: bytes, or one of transformers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from experiments.lib.errors import DataError
from experiments.text.data import Document
from metalora.hf import Sequences
from metalora.meta.causal import IGNORED


class Tokenizer(Protocol):
    """What is needed of a tokenizer.

    Attributes:
        size: of the vocabulary.
        end: the token that stands before and after every document.
        pad: the token to pad with.
    """

    size: int
    end: int
    pad: int

    def encode(self, text: bytes, where: str) -> tuple[list[int], list[int]]:
        """Returns the tokens of a text, and how many of its bytes each stands for."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text of tokens, up to the first end of a document."""
        ...


class Bytes:
    """Every byte is a token."""

    size, end, pad = 258, 256, 257

    def encode(self, text: bytes, where: str) -> tuple[list[int], list[int]]:
        """Returns the bytes."""
        return list(text), [1] * len(text)

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text; what is no UTF-8 becomes a replacement character."""
        kept = itertools.takewhile(lambda token: token < self.end, tokens)
        return bytes(kept).decode(errors="replace")


class Subwords:
    """The tokens of a fast tokenizer of transformers.

    Raises:
        DataError: it has no end token.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                f"{where}: its tokenizer has no end token; set eos_token in its "
                "tokenizer_config.json, or take --tokenizer bytes"
            )
        self._tokenizer = tokenizer
        self.size, self.end = len(tokenizer), tokenizer.eos_token_id
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def encode(self, text: bytes, where: str) -> tuple[list[int], list[int]]:
        """Returns the tokens.

        Raises:
            DataError: the text is not UTF-8.
        """
        try:
            decoded = text.decode()
        except UnicodeDecodeError as error:
            raise DataError(
                f"{where}: not UTF-8 at byte {error.start}; convert it, or take --tokenizer bytes, "
                "which takes any file"
            ) from None
        found = self._tokenizer(
            decoded, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        bytes_before = list(itertools.accumulate((len(c.encode()) for c in decoded), initial=0))
        starts = [bytes_before[start] for start, _ in found["offset_mapping"]]
        starts = [0, *starts[1:]] if starts else []
        return found["input_ids"], [b - a for a, b in itertools.pairwise([*starts, len(text)])]

    def decode(self, tokens: Sequence[int]) -> str:
        """Returns the text."""
        kept = list(itertools.takewhile(lambda token: token != self.end, tokens))
        text: str = self._tokenizer.decode(kept)
        return text


@dataclass(frozen=True)
class Part:
    """Token sequences of some tasks.

    Attributes:
        sequences: with the fields "input_ids" and "labels", int32.
        ids: int64 [N], the task of each.
        tokens: int64 [N], how many tokens of each are predicted.
        bytes: int64 [N], how many bytes of text these stand for.
        cut: how many documents lost tokens.
    """

    sequences: Sequences
    ids: Tensor
    tokens: Tensor
    bytes: Tensor
    cut: int

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Tensor) -> Part:
        """Returns some of the sequences, int64 [n]."""
        return Part(
            self.sequences.take(chosen),
            self.ids[chosen],
            self.tokens[chosen],
            self.bytes[chosen],
            self.cut,
        )


def tokenize(tasks: Sequence[Sequence[Document]], tokenizer: Tokenizer, length: int) -> Part:
    """Makes token sequences of at most ``length`` tokens.

    A text is one long sequence, begun and ended by the end token, and cut into windows that have
    one token in common: the last of a window is the first of the next, so that every token is
    predicted once. A prompt with its response is one sequence, in which the response and the end
    are predicted; where it is too long, the prompt loses its beginning, and then the response its
    end.

    Args:
        tasks: each task's documents; their place is the task id.
        tokenizer: `Bytes` or `Subwords`.
        length: at least 2.

    Raises:
        DataError: a text cannot be tokenised.
    """
    ids: list[int] = []
    labels: list[int] = []
    lengths: list[int] = []
    counts: list[tuple[int, int, int]] = []  # task, tokens and bytes of each sequence
    cut = 0
    for task, of_task in enumerate(tasks):
        for document in of_task:
            text, sizes = tokenizer.encode(document.text, document.where)
            prompt, _ = tokenizer.encode(document.prompt, document.where)
            if document.prompt:
                cut += len(prompt) + len(text) + 2 > length
                text, sizes = text[: length - 1], sizes[: length - 1]
                room = max(0, length - len(text) - 2)
                prompt = prompt[len(prompt) - room :] if room < len(prompt) else prompt
            tokens = [tokenizer.end, *prompt, *text, tokenizer.end]
            known = [IGNORED] * (1 + len(prompt))
            of_bytes = [0] * len(known) + [*sizes, 0]
            wanted = [*known, *tokens[len(known) :]]
            if document.prompt:
                tokens, wanted, of_bytes = tokens[:length], wanted[:length], of_bytes[:length]
            for first in range(0, len(tokens) - 1, length - 1):
                window = slice(first, first + length)
                ids += tokens[window]
                labels += [IGNORED, *wanted[window][1:]]
                lengths.append(len(tokens[window]))
                predicted = sum(label != IGNORED for label in wanted[window][1:])
                counts.append((task, predicted, sum(of_bytes[window][1:])))
    fields = {
        name: torch.tensor(values, dtype=torch.int32)
        for name, values in (("input_ids", ids), ("labels", labels))
    }
    starts = torch.tensor([0, *lengths]).cumsum(0)
    ids_of, predicted_of, bytes_of = (
        torch.tensor(counts, dtype=torch.int64).view(-1, 3).T.contiguous()
    )
    return Part(Sequences(fields, starts), ids_of, predicted_of, bytes_of, cut)


def few(part: Part, wanted: int, generator: torch.Generator) -> Part:
    """Draws so many bytes of each task's text, as whole sequences, and no fewer."""
    chosen = []
    for task in range(int(part.ids.max()) + 1):
        own = (part.ids == task).nonzero()[:, 0]
        own = own[torch.randperm(len(own), generator=generator)]
        before = part.bytes[own].cumsum(0) - part.bytes[own]
        chosen.append(own[before < wanted])
    return part.take(torch.cat(chosen))
