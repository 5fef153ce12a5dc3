"""Notes about settings that were given but change nothing, or less than they say."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence, Set
from typing import Any

from experiments.lib.cli import flag_of, shown


def unused(settings: Any, part_of: Mapping[str, Sequence[str]], kinds: Set[str]) -> list[str]:
    """Returns a line for each setting that differs from its default but that the run does not read.

    Args:
        settings: a settings dataclass as given, before its defaults are filled in.
        part_of: by field the methods and the like that read it; the others are for all.
        kinds: those of this run.
    """
    lines = []
    for field in dataclasses.fields(settings):
        given, readers = getattr(settings, field.name), part_of.get(field.name)
        if readers is not None and given != field.default and kinds.isdisjoint(readers):
            lines.append(
                f"note: {flag_of(field.name)} has no effect in this run: "
                f"it is for {', '.join(readers)} only"
            )
    return lines


def cut(given: Any, used: Any) -> list[str]:
    """Returns a line for each setting that differs from its default and that ``--smoke`` reduced.

    Args:
        given, used: a settings dataclass before and after.
    """
    lines = []
    for field in dataclasses.fields(given):
        before, after = getattr(given, field.name), getattr(used, field.name)
        if before not in (field.default, after):
            lines.append(
                f"note: {flag_of(field.name)} {shown(before)} is cut to {shown(after)} by --smoke"
            )
    return lines


def say(lines: Sequence[str]) -> None:
    """Prints notes on stderr."""
    for line in lines:
        print(line, file=sys.stderr)


def at_most(name: str, wanted: int | None, most: int, what: str) -> list[str]:
    """Returns a line if more was asked for than there is, so that all of it is used.

    Args:
        name: the settings field.
        wanted: its value; None asks for nothing.
        most: the most that there is anywhere.
        what: the most of what, for the message.
    """
    if wanted is None or wanted <= most:
        return []
    return [f"note: {flag_of(name)} {wanted}: {what} at most {most}, so all are used"]
