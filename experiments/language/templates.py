"""Made-up dialogues, for a run without data."""

from __future__ import annotations

import json
import random
from pathlib import Path

FILE = "valid.jsonl"
CLUSTERS, DIALOGUES, TURNS = 8, 10, 4
THINGS = ("dogs", "cars", "books", "trains", "cakes", "songs", "boats", "films", "games", "plants")
QUESTIONS = ("do you like {} ?", "what about {} ?", "tell me about your {} .", "i have many {} .")
ANSWERS = ("i love {} .", "{} are my life .", "no , {} bore me .", "my mother has two {} .")


def write(folder: Path) -> None:
    """Writes a file of dialogues, always the same, in which an answer is about what was asked."""
    draw = random.Random(0)
    with (folder / FILE).open("w", encoding="utf-8") as file:
        for cluster in range(1, CLUSTERS + 1):
            for _ in range(DIALOGUES):
                turns = []
                for thing in draw.sample(THINGS, TURNS):
                    adjective = draw.choice(("red", "old", "new", "big", "small"))
                    about = f"{adjective} {thing}"
                    question, answer = draw.choice(QUESTIONS), draw.choice(ANSWERS)
                    turns.append([question.format(about), answer.format(about)])
                file.write(json.dumps({"cluster": cluster, "turns": turns}) + "\n")
