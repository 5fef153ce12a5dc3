"""The candidates of every turn: distractors where a file has none, in an order drawn by seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.language.dialogues import DataError, Dialogue, Turn


class Candidates:
    """Makes the candidate lists of one file's dialogues.

    Distractors are drawn uniformly from the responses of the file's other dialogues, all
    different and none equal to the right one. The order, also of lists that came with the file,
    is drawn, so that it does not tell the answer. What is drawn depends on the seed and on the
    dialogue's place in the file only: other settings leave the lists as they are.

    Args:
        dialogues: all of the file.
        count: how many candidates a turn has, the right one included.
    """

    def __init__(self, dialogues: Sequence[Dialogue], count: int, seed: int, path: Path) -> None:
        self._count, self._seed = count, seed
        self._place = {d.where: i for i, d in enumerate(dialogues)}
        responses = [(t.response, i) for i, d in enumerate(dialogues) for t in d.turns]
        self._responses = [response for response, _ in responses]
        self._speakers = [i for _, i in responses]
        self.drawn = any(len(d.turns[0].candidates) == 1 for d in dialogues)
        # Without the longest dialogue's own responses at least so many different ones are left.
        longest = max((len(d.turns) for d in dialogues), default=0)
        different = len(set(self._responses))
        if self.drawn and different - longest < count - 1:
            raise DataError(
                f"{path}: {count - 1} distractors cannot be drawn from its {different} different "
                "responses; give a file with more dialogues, or fewer --candidates"
            )

    def complete(self, dialogue: Dialogue) -> Dialogue:
        """The dialogue with ``count`` candidates at every turn."""
        place = self._place[dialogue.where]
        generator = np.random.default_rng([self._seed, place])
        turns = tuple(self._complete(turn, place, generator) for turn in dialogue.turns)
        return dataclasses.replace(dialogue, turns=turns)

    def _complete(self, turn: Turn, place: int, generator: np.random.Generator) -> Turn:
        candidates = turn.candidates
        if len(candidates) == 1:
            candidates = (turn.response, *self._distractors(turn.response, place, generator))
        shuffled = tuple(candidates[i] for i in generator.permutation(len(candidates)))
        return Turn(turn.utterance, shuffled, shuffled.index(turn.response))

    def _distractors(self, response: str, place: int, generator: np.random.Generator) -> list[str]:
        drawn: dict[str, None] = {}
        while len(drawn) < self._count - 1:
            for i in generator.integers(len(self._responses), size=self._count).tolist():
                text = self._responses[i]
                if self._speakers[i] != place and text != response:
                    drawn[text] = None
        return list(drawn)[: self._count - 1]
