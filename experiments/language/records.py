"""Dialogues as records: JSON lines, and folders of the `datasets` library with the same columns.

| field | what |
| --- | --- |
| ``cluster`` | number of the responder's persona cluster |
| ``turns`` | list of [utterance, response] |
| ``match`` | "exact" or "partial"; "exact" if absent |
| ``candidates`` | of each turn the list of candidates, its response among them; drawn if absent |
| ``persona`` | list of sentences; not needed |
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from experiments.language.dialogues import (
    EXACT,
    PARTIAL,
    DataError,
    Dialogue,
    make_turn,
    numbered_lines,
)

DATASET_STATE = "state.json"  # what marks a folder that Dataset.save_to_disk wrote


def read_json_lines(path: Path, candidates: int) -> list[Dialogue]:
    """The dialogues of a file with one JSON object a line.

    Args:
        candidates: how many every list must have, where the file has lists.

    Raises:
        DataError: the file is damaged; says at which line.
    """
    records = []
    for line, text in numbered_lines(path):
        where = f"{path}:{line}"
        try:
            records.append((where, json.loads(text)))
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise DataError(f"{where}: no JSON ({reason}); is the line cut off?") from None
    return _dialogues(records, candidates)


def read_dataset(path: Path, candidates: int) -> list[Dialogue]:
    """The dialogues of a folder that ``datasets.Dataset.save_to_disk`` wrote.

    Args:
        candidates: how many every list must have, where the data have lists.

    Raises:
        DataError: the `datasets` library is not installed, or the folder is damaged.
    """
    try:
        from datasets import load_from_disk
    except ImportError:
        raise DataError(f"{path} needs the datasets library: pip install datasets") from None
    try:
        rows = load_from_disk(str(path)).to_list()
    except Exception as error:  # whatever damaged files make pyarrow or datasets raise
        reason = str(error).split("\n", 1)[0]
        raise DataError(f"{path} is damaged ({reason}); save the dataset again") from None
    return _dialogues(((f"{path} row {i}", row) for i, row in enumerate(rows)), candidates)


def _dialogues(records: Iterable[tuple[str, Any]], wanted: int) -> list[Dialogue]:
    dialogues: list[Dialogue] = []
    with_lists: bool | None = None
    for where, record in records:
        if not isinstance(record, Mapping):
            raise DataError(f"{where}: wanted an object with fields cluster and turns")
        lists = record.get("candidates")
        if with_lists is None:
            with_lists = lists is not None
        if with_lists != (lists is not None):
            raise DataError(
                f"{where}: field candidates must be in all dialogues of a file or in none"
            )
        dialogues.append(_dialogue(record, wanted, where))
    return dialogues


def _dialogue(record: Mapping[str, Any], wanted: int, where: str) -> Dialogue:
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
        made.append(make_turn(utterance, response, given, wanted, f"{where}, turn {number}"))
    return Dialogue(where, tuple(persona), tuple(made), cluster, match)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)
