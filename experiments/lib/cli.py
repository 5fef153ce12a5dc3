"""Command lines from frozen dataclasses: every field is a flag, every mistake is one line."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import shutil
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from experiments.lib.errors import too_large
from experiments.lib.runs import INTERRUPTED, RunError
from metalora._checks import check_count, check_nonnegative, check_positive, did_you_mean

Settings = TypeVar("Settings")
Value = TypeVar("Value")
WRONG_USE = 2
HELP_COLUMNS, _LONGEST_METAVAR = 100, 45
MOST_TRIALS = 10_000  # more are a slip of the finger, and would fill the memory before they fail
_LARGEST = 10**18  # beyond it, sums of sizes overflow


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    choices: Sequence[str] | None = None,
    positional: bool = False,
    run_only: bool = False,
) -> Any:
    """A dataclass field with what the command line needs to know about it.

    Args:
        default: the field's default; without one the flag must be given.
        help: one line for ``--help``.
        choices: the values allowed, for text and for tuples of text.
        positional: an argument without a flag.
        run_only: says where or how to run, not what to compute; may change on ``--resume``.
    """
    metadata = {"help": help, "choices": choices, "positional": positional, "run_only": run_only}
    return dataclasses.field(default=default, metadata=metadata)


def parse(
    settings: type[Settings],
    argv: Sequence[str] | None = None,
    *,
    prog: str,
    description: str = "",
) -> Settings:
    """Reads a command line into a settings dataclass.

    Field types may be bool, int, float, str, Path, ``tuple[X, ...]`` (several values) and
    ``X | None``. A wrong flag or value, or a ValueError or TypeError of the dataclass's own
    ``__post_init__``, ends the process with exit code 2 and one line on stderr.

    In ``description`` blank lines separate paragraphs; one that begins with a command, such as
    ``python -m ...``, keeps its lines.
    """
    parser = _Parser(prog=prog, description=description, allow_abbrev=False, formatter_class=_Help)
    hints = typing.get_type_hints(settings)
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        _add(parser, field, hints[field.name])
    argv = list(sys.argv[1:] if argv is None else argv)
    known = [o for action in parser._actions for o in action.option_strings]
    # Before argparse sees them, since it would take an unknown option's value for an argument.
    for flag in (a.split("=", 1)[0] for a in argv if a.startswith("--")):
        if flag not in known:
            parser.error(f"unknown option {flag}{did_you_mean(flag, known)}")
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"unexpected argument {unknown[0]!r}; see {prog} --help")
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in vars(values).items()}
    try:
        return settings(**given)
    except (ValueError, TypeError) as error:
        parser.error(str(error))


def check_numbers(command: str, settings: Any, zero: Sequence[str] = ()) -> None:
    """Refuses numbers that are not above zero, or, of the fields named in ``zero``, below it.

    Raises:
        ValueError: which names the command, the flag and the number.
    """
    for field in dataclasses.fields(settings):
        given = getattr(settings, field.name)
        flag = "--" + field.name.replace("_", "-")
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, bool):
                continue
            if isinstance(value, int):
                check_count(command, flag, value, minimum=0 if field.name in zero else 1)
            elif isinstance(value, float):
                (check_nonnegative if field.name in zero else check_positive)(command, flag, value)


def unique(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Each value once, where it came first."""
    return tuple(dict.fromkeys(values))


def main_guard(main: Callable[..., int | None]) -> Callable[..., NoReturn]:
    """Ends the process the way a command should.

    What the user can put right is one line on stderr and exit code 2: RunError and ValueError, a
    file that cannot be read or written, and sizes for which the memory is too small. Ctrl-C is one
    line and exit code 130; anything else keeps its traceback.
    """

    @functools.wraps(main)
    def guarded(*args: Any, **kwargs: Any) -> NoReturn:
        try:
            sys.exit(main(*args, **kwargs))
        except (RunError, ValueError) as error:
            _fail(str(error))
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            _fail(where + (error.strerror or str(error)))
        except (MemoryError, RuntimeError, OverflowError) as error:
            if not too_large(error):
                raise
            what = str(error).partition("\n")[0]  # of torch's errors the rest is a backtrace
            _fail(f"not enough memory for these settings, choose smaller ones ({what})")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return guarded


def _fail(message: str) -> NoReturn:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(WRONG_USE)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        _fail(message)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        columns = min(shutil.get_terminal_size().columns, HELP_COLUMNS)
        super().__init__(prog, width=columns - 2)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        paragraphs = (part.strip("\n") for part in text.split("\n\n"))
        return "\n\n".join(
            part if part.lstrip().startswith("python -m") else fill(part, width, indent)
            for part in paragraphs
        )

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        # argparse would show the values of an option that takes several twice.
        if action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE):
            (metavar,) = self._metavar_formatter(action, default_metavar)(1)
            return f"{metavar} ..."
        return super()._format_args(action, default_metavar)


def _add(parser: argparse.ArgumentParser, field: dataclasses.Field[Any], hint: Any) -> None:
    required = field.default is dataclasses.MISSING
    default = None if required else field.default
    several, kind = _value_type(hint)
    choices = field.metadata.get("choices")
    flag = "--" + field.name.replace("_", "-")
    keywords: dict[str, Any] = {"help": _help(field, required), "default": default}
    if kind is bool:
        if default is False:
            keywords["action"] = "store_true"
        else:
            keywords["action"] = argparse.BooleanOptionalAction
        parser.add_argument(flag, dest=field.name, **keywords)
        return
    keywords["type"] = _converter(kind, choices)
    metavar = kind.__name__.upper()
    if choices:
        metavar = "{" + ",".join(choices) + "}"
        if len(metavar) > _LONGEST_METAVAR:
            metavar = kind.__name__.upper()
            keywords["help"] += "; one of " + ", ".join(choices)
    keywords["metavar"] = f"{field.name}:{metavar}" if field.metadata.get("positional") else metavar
    if several:
        keywords["nargs"] = "+"
    if field.metadata.get("positional"):
        if not required:
            keywords["nargs"] = "*" if several else "?"
        parser.add_argument(field.name, **keywords)
    else:
        parser.add_argument(flag, dest=field.name, required=required, **keywords)


def _help(field: dataclasses.Field[Any], required: bool) -> str:
    text = str(field.metadata.get("help", ""))
    if required or field.default is None or isinstance(field.default, bool):
        shown = ""
    elif isinstance(field.default, tuple):
        shown = " ".join(str(v) for v in field.default)
    else:
        shown = str(field.default)
    return (text + (f" (default: {shown})" if shown else "")).replace("%", "%%")


def _value_type(hint: Any) -> tuple[bool, Any]:
    """(whether several values are taken, the type of one) of a field's type hint."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        (hint,) = [a for a in typing.get_args(hint) if a is not type(None)]
    if typing.get_origin(hint) is tuple:
        return True, typing.get_args(hint)[0]
    if hint not in (bool, int, float, str, Path):
        raise TypeError(f"parse: a settings field cannot be of type {hint}")
    return False, hint


def _converter(kind: Any, choices: Sequence[str] | None) -> Callable[[str], Any]:
    wanted = {int: "a whole number", float: "a number", str: "text", Path: "a path"}[kind]

    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        # Path("") would be the current folder; what cannot be printed cannot be recorded either.
        if value is None or not (text and text.isprintable()):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        if kind is int and abs(value) > _LARGEST:
            raise argparse.ArgumentTypeError(f"must be at most 10^18, got {text}")
        if choices is not None and str(value) not in choices:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(choices)}, got {text!r}{did_you_mean(text, choices)}"
            )
        return value

    return convert
