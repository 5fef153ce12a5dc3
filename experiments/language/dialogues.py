"""What every form of dialogue file is read into, and what is checked of all of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.lib.errors import RunError

SILENCE = "__SILENCE__"  # what ConvAI2 has the other one "say" before somebody opens a dialogue
CATCH_ALL = 0  # the cluster under which the persona maps file personas that are unlike each other
EXACT, PARTIAL, UNMATCHED = "exact", "partial", "unmatched"
_SURROGATES = re.compile("[\ud800-\udfff]")


class DataError(RunError):
    """The data or the model are missing or damaged; says where and what to do, in one line."""


@dataclass(frozen=True)
class Turn:
    """One utterance and the responses to choose from.

    Attributes:
        utterance: what the partner says; ``SILENCE`` where the responder opens the dialogue.
        candidates: the responses; a file without candidate lists has only the true one here.
        answer: which candidate is the true one.
    """

    utterance: str
    candidates: tuple[str, ...]
    answer: int

    @property
    def response(self) -> str:
        return self.candidates[self.answer]


@dataclass(frozen=True)
class Dialogue:
    """A dialogue from the responder's side.

    Attributes:
        where: file and line (or row) it begins at.
        persona: sentences about the responder; the files with clusters may leave them out.
        cluster: number of the responder's persona cluster, None if unmatched.
        match: "exact", "partial" or "unmatched": how the persona lies in its cluster.
    """

    where: str
    persona: tuple[str, ...]
    turns: tuple[Turn, ...]
    cluster: int | None = None
    match: str = UNMATCHED


def make_turn(
    utterance: str, response: str, candidates: Sequence[str] | None, wanted: int, where: str
) -> Turn:
    """A turn with its texts stripped; None stands for a file without candidate lists.

    Raises:
        DataError: a text is empty or not Unicode, there are not ``wanted`` candidates, or none of
            them is the response.
    """
    utterance, response = utterance.strip(), response.strip()
    stripped = tuple(c.strip() for c in candidates or ())
    named = (
        ("utterance", utterance),
        ("response", response),
        *(("candidate", c) for c in stripped),
    )
    for name, text in named:
        if not text:
            raise DataError(f"{where}: the {name} is empty; is the line cut off?")
        if _SURROGATES.search(text):  # JSON can write half a character, which no tokenizer takes
            raise DataError(f"{where}: the {name} has half a UTF-16 pair; repair its \\u escape")
    if candidates is None:
        return Turn(utterance, (response,), 0)
    if len(stripped) != wanted:
        raise DataError(
            f"{where}: wanted {wanted} candidates, got {len(stripped)}; "
            "is the line cut off? (--candidates sets how many there are)"
        )
    if response not in stripped:
        raise DataError(
            f"{where}: the response {response[:40]!r} is not among its {wanted} candidates; "
            "is the line cut off?"
        )
    return Turn(utterance, stripped, stripped.index(response))


def numbered_lines(path: Path, *, ended: bool = False) -> list[tuple[int, str]]:
    """The lines of a UTF-8 text file that are not blank, with their numbers from 1.

    Args:
        ended: whether the last one must have an end, for files whose lines do not show otherwise
            that they are whole.

    Raises:
        DataError: the file cannot be read, is not UTF-8, or ends within a line.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8; convert the file to UTF-8") from None
    if ended and text and not text.endswith("\n"):
        line = text.count("\n") + 1
        raise DataError(
            f"{path}:{line}: the last line has no end; is it cut off? "
            "(if it is whole, add a line break)"
        )
    # Only "\n" ends a line: splitlines() would also cut at Unicode's other separators.
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.rstrip("\r")) for number, line in lines if line.strip()]
