"""ParlAI's dialogue files: numbered lines, 1 begins a dialogue, persona lines before its turns.

    1 your persona: i have two dogs.
    2 hello , how are you ?<TAB>walking my dogs .<TAB><TAB>first candidate|...|last candidate

The last two fields are absent from files without candidate lists. A dialogue with nobody's but the
*partner's* persona is read from the partner's side, whose persona is the one that is known: it is
shifted by one utterance, and opened by silence where the partner spoke first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from experiments.language.dialogues import (
    SILENCE,
    DataError,
    Dialogue,
    Turn,
    make_turn,
    numbered_lines,
)

OWN, PARTNERS = "your persona:", "partner's persona:"
FIELDS, FIELDS_WITH_CANDIDATES = 2, 4

Line = tuple[int, str]  # its number in the file; what stands behind its number in the dialogue


def read(path: Path, candidates: int) -> list[Dialogue]:
    """The dialogues of a file, not matched to clusters yet.

    Args:
        candidates: how many every list must have, where the file has lists.

    Raises:
        DataError: the file is damaged; says at which line.
    """
    blocks = _blocks(path)
    turns = (text for block in blocks for _, text in block if "\t" in text)
    fields = next(turns, "").count("\t") + 1
    return [_dialogue(path, block, fields, candidates) for block in blocks]


def _blocks(path: Path) -> list[list[Line]]:
    """The lines of each dialogue."""
    blocks: list[list[Line]] = []
    previous = 0
    for line, content in numbered_lines(path, ended=True):
        number, _, text = content.partition(" ")
        if not number.isdecimal() or not text.strip():
            raise DataError(f"{path}:{line}: wanted a number and text; is the line cut off?")
        if int(number) == 1:
            blocks.append([])
        elif int(number) != previous + 1:
            raise DataError(
                f"{path}:{line}: wanted line number {previous + 1} (or 1, for a new dialogue), "
                f"got {number}; lines are missing or repeated"
            )
        previous = int(number)
        blocks[-1].append((line, text))
    return blocks


def _dialogue(path: Path, block: Sequence[Line], fields: int, candidates: int) -> Dialogue:
    own: list[str] = []
    partners: list[str] = []
    turns: list[Turn] = []
    for line, text in block:
        if text.startswith(OWN):
            own.append(text.removeprefix(OWN).strip())
        elif text.startswith(PARTNERS):
            partners.append(text.removeprefix(PARTNERS).strip())
        else:
            turns.append(_turn(text, fields, candidates, f"{path}:{line}"))
    where = f"{path}:{block[0][0]}"
    if partners and not own:
        own, turns = partners, _other_side(turns)
    if not turns:
        raise DataError(f"{where}: the dialogue has no turns; is the file cut off?")
    return Dialogue(where, tuple(own), tuple(turns))


def _turn(text: str, fields: int, candidates: int, where: str) -> Turn:
    parts = text.split("\t")
    if len(parts) != fields or fields not in (FIELDS, FIELDS_WITH_CANDIDATES):
        wanted = fields if fields in (FIELDS, FIELDS_WITH_CANDIDATES) else "2 or 4"
        raise DataError(
            f"{where}: wanted {wanted} fields separated by tabs (utterance, response and, in all "
            f"turns or in none, nothing and the candidates), got {len(parts)}; "
            "is the line cut off?"
        )
    given = parts[3].split("|") if fields == FIELDS_WITH_CANDIDATES else None
    return make_turn(parts[0], parts[1], given, candidates, where)


def _other_side(turns: Sequence[Turn]) -> list[Turn]:
    """The same dialogue with the partner as the responder; candidate lists do not carry over."""
    said = [text for turn in turns for text in (turn.utterance, turn.response)]
    said = said[1:] if said[:1] == [SILENCE] else [SILENCE, *said]
    return [Turn(u, (r,), 0) for u, r in zip(said[::2], said[1::2], strict=False)]
