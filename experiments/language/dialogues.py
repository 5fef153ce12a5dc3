"""Files of dialogues, all read into one form.

ParlAI's text files have numbered lines; number 1 begins a dialogue, persona lines come first:

    1 your persona: i have two dogs.
    2 hello , how are you ?<TAB>walking my dogs .<TAB><TAB>first candidate|...|last candidate

Files without candidate lists lack the last two fields. A dialogue that has only the *partner's*
persona is read from the partner's side: shifted by one utterance, and opened by silence if the
partner spoke first. ``<first word of the file's name>_persona_map.json`` beside the file lists the
persona clusters.

JSON lines, and folders that ``datasets.Dataset.save_to_disk`` wrote, have a record per dialogue:

| field | what |
| --- | --- |
| ``cluster`` | number of the responder's persona cluster |
| ``turns`` | list of [utterance, response] |
| ``match`` | "exact" or "partial"; "exact" if absent |
| ``candidates`` | for each turn the list of candidates, its response among them; drawn if absent |
| ``persona`` | list of sentences; not needed |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.lib.errors import DataError
from metalora._checks import first_line

SILENCE = "__SILENCE__"  # what ConvAI2 has the partner "say" before the responder's first words
EXACT, PARTIAL, UNMATCHED = "exact", "partial", "unmatched"
MAY_DIFFER = 2  # sentences of a partial match that its cluster does not have
DATASET_STATE = "state.json"  # marks a folder that Dataset.save_to_disk wrote
OWN, PARTNERS = "your persona:", "partner's persona:"
FIELDS, FIELDS_WITH_CANDIDATES = 2, 4
# In this order: "won't" is not "wo not".
CONTRACTIONS = (
    ("won't", "will not"),
    ("can't", "can not"),
    ("cannot", "can not"),
    ("cant", "can not"),  # also within longer words, on both sides of a comparison
    ("let's", "let us"),
    ("n't", " not"),
    ("'m", " am"),
    ("'re", " are"),
    ("'ve", " have"),
    ("'ll", " will"),
    ("'d", " would"),
    ("'s", " is"),
)
_SURROGATES = re.compile("[\ud800-\udfff]")

Line = tuple[int, str]  # its number in the file, and what follows its number in the dialogue


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
        where: file and line (or row) at which it begins.
        persona: sentences about the responder; records may leave them out.
        cluster: number of the responder's persona cluster, None if unmatched.
        match: "exact", "partial" or "unmatched": how the persona lies in its cluster.
    """

    where: str
    persona: tuple[str, ...]
    turns: tuple[Turn, ...]
    cluster: int | None = None
    match: str = UNMATCHED


def is_dialogues(path: Path) -> bool:
    """Checks whether a path has one of the forms that `read` knows."""
    if path.is_dir():
        return (path / DATASET_STATE).is_file()
    return path.is_file() and path.suffix in (".txt", ".jsonl")


def read(path: Path, per_turn: int) -> tuple[list[Dialogue], dict[str, str]]:
    """Reads a file or folder of dialogues, of any of the three forms.

    Args:
        per_turn: how many candidates every list must have, where the file has lists.

    Returns:
        the dialogues with their clusters, and the sha256 of each file read by its name.

    Raises:
        DataError: something is missing or damaged; says where.
    """
    sha256 = {path.name: _sha256(path)}
    if path.is_dir():
        return _read_dataset(path, per_turn), sha256
    if path.suffix == ".jsonl":
        return _read_json_lines(path, per_turn), sha256
    dialogues = read_parlai(path, per_turn)
    map_path = path.with_name(f"{path.stem.split('_')[0]}_persona_map.json")
    personas = PersonaMap(map_path)
    sha256[map_path.name] = _sha256(map_path)
    for i, dialogue in enumerate(dialogues):
        cluster, match = personas.match(dialogue.persona)
        dialogues[i] = dataclasses.replace(dialogue, cluster=cluster, match=match)
    return dialogues, sha256


def read_parlai(path: Path, per_turn: int) -> list[Dialogue]:
    """Reads the dialogues of a file in ParlAI's format, not matched to clusters yet."""
    blocks: list[list[Line]] = []
    previous = 0
    for line, content in _numbered_lines(path, ended=True):
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
    turns = (text for block in blocks for _, text in block if "\t" in text)
    fields = next(turns, "").count("\t") + 1
    return [_parlai_dialogue(path, block, fields, per_turn) for block in blocks]


def _parlai_dialogue(path: Path, block: Sequence[Line], fields: int, per_turn: int) -> Dialogue:
    own: list[str] = []
    partners: list[str] = []
    turns: list[Turn] = []
    for line, text in block:
        if text.startswith(OWN):
            own.append(text.removeprefix(OWN).strip())
        elif text.startswith(PARTNERS):
            partners.append(text.removeprefix(PARTNERS).strip())
        else:
            turns.append(_parlai_turn(text, fields, per_turn, f"{path}:{line}"))
    where = f"{path}:{block[0][0]}"
    if partners and not own:
        own, turns = partners, _other_side(turns)
    if not turns:
        raise DataError(f"{where}: the dialogue has no turns; is the file cut off?")
    return Dialogue(where, tuple(own), tuple(turns))


def _parlai_turn(text: str, fields: int, per_turn: int, where: str) -> Turn:
    parts, known = text.split("\t"), (FIELDS, FIELDS_WITH_CANDIDATES)
    if len(parts) != fields or fields not in known:
        wanted = fields if fields in known else "2 or 4"
        raise DataError(
            f"{where}: wanted {wanted} fields separated by tabs (utterance, response and, in all "
            f"turns or in none, nothing and the candidates), got {len(parts)}; "
            "is the line cut off?"
        )
    given = parts[3].split("|") if fields == FIELDS_WITH_CANDIDATES else None
    return _turn(parts[0], parts[1], given, per_turn, where)


def _other_side(turns: Sequence[Turn]) -> list[Turn]:
    """Makes the partner the responder; candidate lists do not carry over."""
    said = [text for turn in turns for text in (turn.utterance, turn.response)]
    said = said[1:] if said[:1] == [SILENCE] else [SILENCE, *said]
    return [Turn(u, (r,), 0) for u, r in zip(said[::2], said[1::2], strict=False)]


def plain(sentence: str) -> str:
    """Returns a sentence in lower case, contractions written out and punctuation removed."""
    sentence = sentence.lower()
    for short, written_out in CONTRACTIONS:
        sentence = sentence.replace(short, written_out)
    return " ".join(re.sub(r"[^\w\s]", " ", sentence).split())


class PersonaMap:
    """Persona clusters, each with a number and the variants of one persona.

    Args:
        path: a JSON object ``{"<cluster>": [[sentence, ...], ...], ...}``.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._variants: dict[frozenset[str], int] = {}
        self._clusters_with: dict[str, set[int]] = defaultdict(set)
        for cluster, variants in sorted(_read_clusters(path).items()):
            for variant in variants:
                sentences = frozenset(map(plain, variant))
                self._variants.setdefault(sentences, cluster)
                for sentence in sentences:
                    self._clusters_with[sentence].add(cluster)

    def match(self, persona: Iterable[str]) -> tuple[int | None, str]:
        """Returns the cluster of a persona and how it matches.

        "exact": the persona is one of the cluster's variants, sentence for sentence. "partial":
        all but at most two of its sentences, and at least one, are in that cluster, which has
        most of them (of two with as many, the one with the smaller number). Otherwise
        (None, "unmatched").
        """
        sentences = frozenset(map(plain, persona))
        if sentences in self._variants:
            return self._variants[sentences], EXACT
        shared = Counter(c for s in sentences for c in self._clusters_with.get(s, ()))
        if shared:
            cluster = min(shared, key=lambda c: (-shared[c], c))
            if len(sentences) - shared[cluster] <= MAY_DIFFER:
                return cluster, PARTIAL
        return None, UNMATCHED


def _read_clusters(path: Path) -> dict[int, list[list[str]]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        clusters = {int(cluster): variants for cluster, variants in stored.items()}
    except FileNotFoundError:
        raise DataError(
            f"{path} is missing: dialogues in ParlAI's format need the persona map of their split"
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, AttributeError) as error:
        detail = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "no map"
        raise DataError(
            f"{path} is damaged ({detail}): wanted a JSON object from cluster numbers to lists of "
            "personas; fetch it again"
        ) from None
    for cluster, variants in clusters.items():
        if not (variants and _is_list(variants, lambda v: v and _is_texts(v))):
            raise DataError(
                f"{path} is damaged: cluster {cluster} is not a list of personas, each a list of "
                "sentences; fetch it again"
            )
    return clusters


def _read_json_lines(path: Path, per_turn: int) -> list[Dialogue]:
    records = []
    for line, text in _numbered_lines(path):
        where = f"{path}:{line}"
        try:
            records.append((where, json.loads(text)))
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise DataError(f"{where}: no JSON ({reason}); is the line cut off?") from None
    return _from_records(records, per_turn)


def _read_dataset(path: Path, per_turn: int) -> list[Dialogue]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise DataError(f"{path} needs the datasets library: pip install datasets") from None
    try:
        rows = load_from_disk(str(path)).to_list()
    except Exception as error:  # pyarrow and datasets raise many kinds for damaged files
        raise DataError(
            f"{path} is damaged ({first_line(error)}); save the dataset again"
        ) from None
    return _from_records(((f"{path} row {i}", row) for i, row in enumerate(rows)), per_turn)


def _from_records(records: Iterable[tuple[str, Any]], per_turn: int) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    with_lists: bool | None = None
    for where, record in records:
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: wanted an object with fields cluster and turns")
        has_lists = record.get("candidates") is not None
        if with_lists is None:
            with_lists = has_lists
        if with_lists != has_lists:
            raise DataError(
                f"{where}: field candidates must be in all dialogues of a file or in none"
            )
        dialogues.append(_from_record(record, per_turn, where))
    return dialogues


def _from_record(record: Mapping[str, Any], per_turn: int, where: str) -> Dialogue:
    cluster, match = record.get("cluster"), record.get("match") or EXACT
    turns, persona = record.get("turns"), record.get("persona") or []
    if not isinstance(cluster, int) or isinstance(cluster, bool):
        raise DataError(f"{where}: field cluster must be a whole number, got {cluster!r}")
    if match not in (EXACT, PARTIAL):
        raise DataError(f'{where}: field match must be "exact" or "partial", got {match!r}')
    if not _is_texts(persona):
        raise DataError(f"{where}: field persona must be a list of sentences")
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: field turns must be a list of [utterance, response]")
    lists = record.get("candidates")
    if lists is None:
        lists = [None] * len(turns)
    elif not isinstance(lists, list) or len(lists) != len(turns):
        raise DataError(f"{where}: field candidates must be a list of {len(turns)} lists")
    made = []
    for number, (turn, given) in enumerate(zip(turns, lists, strict=True), start=1):
        if not _is_texts(turn) or len(turn) != 2:
            raise DataError(f"{where}: turn {number} must be [utterance, response]")
        if given is not None and not _is_texts(given):
            raise DataError(f"{where}: the candidates of turn {number} must be a list of texts")
        utterance, response = turn
        made.append(_turn(utterance, response, given, per_turn, f"{where}, turn {number}"))
    return Dialogue(where, tuple(persona), tuple(made), cluster, match)


def _turn(
    utterance: str, response: str, candidates: Sequence[str] | None, per_turn: int, where: str
) -> Turn:
    """Makes a turn of stripped texts; None stands for a file without candidate lists."""
    utterance, response = utterance.strip(), response.strip()
    stripped = tuple(c.strip() for c in candidates or ())
    named = [("utterance", utterance), ("response", response)]
    for name, text in (*named, *(("candidate", c) for c in stripped)):
        if not text:
            raise DataError(f"{where}: the {name} is empty; is the line cut off?")
        if _SURROGATES.search(text):  # JSON can write half a character, which no tokenizer takes
            raise DataError(f"{where}: the {name} has half a UTF-16 pair; repair its \\u escape")
    if candidates is None:
        return Turn(utterance, (response,), 0)
    if len(stripped) != per_turn:
        raise DataError(
            f"{where}: wanted {per_turn} candidates, got {len(stripped)}; "
            "is the line cut off? (--candidates sets how many there are)"
        )
    if response not in stripped:
        raise DataError(
            f"{where}: the response {response[:40]!r} is not among its {per_turn} candidates; "
            "is the line cut off?"
        )
    return Turn(utterance, stripped, stripped.index(response))


def _numbered_lines(path: Path, *, ended: bool = False) -> list[Line]:
    """Reads the lines of a UTF-8 text file that are not blank, with their numbers from 1.

    Args:
        ended: whether the last line must end in a line break, for files whose lines do not show
            otherwise that they are whole.
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


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    for file in files:
        try:
            digest.update(file.read_bytes())
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(of, value))


def _is_texts(value: Any) -> bool:
    return _is_list(value, lambda text: isinstance(text, str))
