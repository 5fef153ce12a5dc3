"""Which of a foreign file's regular expressions matches a name, in limited time.

Python cannot interrupt a running regular expression, and no check beforehand finds exactly those
that take for ever. So a process of its own matches them, and is killed when it takes too long.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

CPU_SECONDS = 5
_WALL_SECONDS = 60  # where the system cannot limit a process's own time, and for a busy machine
BYTES = 2**29


class PatternError(ValueError):
    """A pattern that cannot be matched: its place among the patterns, and why."""

    def __init__(self, place: int, reason: str) -> None:
        super().__init__(reason)
        self.place = place


@lru_cache(maxsize=64)  # the folders of an export mostly have the same
def first_matches(patterns: tuple[str, ...], names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Per name the place of the first pattern that matches it as peft does, or None.

    Raises:
        PatternError: if a pattern is not valid, or takes too long or too much memory.
    """
    if not patterns or not names:
        return (None,) * len(names)
    found: list[int | None] = [None] * len(names)
    answers = _ask(patterns, names)
    for place in range(len(patterns)):
        answer = answers[place] if place < len(answers) else "takes too long to match"
        if isinstance(answer, str):
            raise PatternError(place, answer)
        for name in answer:
            found[name] = place
    return tuple(found)


def _ask(patterns: tuple[str, ...], names: tuple[str, ...]) -> list[list[int] | str]:
    """What `match` writes before it ends or is killed: at the pattern without an answer."""
    limits = {"cpu_seconds": CPU_SECONDS, "bytes": BYTES}
    request = json.dumps({"patterns": patterns, "names": names, **limits})
    command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("match.py"))]
    try:
        output = subprocess.run(
            command, input=request.encode(), capture_output=True, timeout=_WALL_SECONDS
        ).stdout
    except subprocess.TimeoutExpired as expired:
        output = expired.stdout or b""
    return [json.loads(line) for line in output.splitlines(keepends=True) if line.endswith(b"\n")]
