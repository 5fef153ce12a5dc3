"""Persona maps: which cluster a dialogue's persona belongs to."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from experiments.language.dialogues import EXACT, PARTIAL, UNMATCHED, DataError

MAY_DIFFER = 2  # sentences of a partial match that its cluster does not have
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


def plain(sentence: str) -> str:
    """A sentence in small letters, contractions written out, without punctuation."""
    sentence = sentence.lower()
    for short, written_out in CONTRACTIONS:
        sentence = sentence.replace(short, written_out)
    return " ".join(re.sub(r"[^\w\s]", " ", sentence).split())


class PersonaMap:
    """Persona clusters, each a number and the variants of one persona.

    Args:
        path: a JSON object ``{"<cluster>": [[sentence, ...], ...], ...}``.

    Raises:
        DataError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self._variants: dict[frozenset[str], int] = {}
        self._clusters_with: dict[str, set[int]] = defaultdict(set)
        for cluster, variants in sorted(_read(path).items()):
            for variant in variants:
                sentences = frozenset(map(plain, variant))
                self._variants.setdefault(sentences, cluster)
                for sentence in sentences:
                    self._clusters_with[sentence].add(cluster)

    def match(self, persona: Iterable[str]) -> tuple[int | None, str]:
        """The cluster of a persona and how it matches.

        "exact": the persona is one of the cluster's variants, sentence for sentence. "partial":
        all but at most two of its sentences, and at least one, are in that cluster, which has
        most of them (the smaller number, where two have as many). Else (None, "unmatched").
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


def _read(path: Path) -> dict[int, list[list[str]]]:
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
        if not _is_list(variants, lambda v: _is_list(v, lambda s: isinstance(s, str))):
            raise DataError(
                f"{path} is damaged: cluster {cluster} is not a list of personas, each a list of "
                "sentences; fetch it again"
            )
    return clusters


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(map(of, value))
