"""Command lines from frozen dataclasses, read by cyclopts: every field is a flag, or an argument.

A mistake ends the process with one line on stderr and exit code 2. Why cyclopts: it raises its
errors, so that they can be printed as one line; tyro prints them itself, in several.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shutil
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from cyclopts import App, CoercionError, CycloptsError, Parameter, Token, convert

from experiments.lib.errors import INTERRUPTED, RunError, too_large
from metalora._checks import check_choice, check_count, check_nonnegative, check_positive
from metalora.meta import ProcessGroupError

Settings = TypeVar("Settings")
Value = TypeVar("Value")
WRONG_USE = 2
HELP_COLUMNS = 100
# Seconds in which torchrun ends its processes after the first has failed, so that what goes wrong
# in all of them is said once.
GRACE = 5.0
MOST_TRIALS = 10_000  # more are a typing error, and would fill the memory before they fail
_LARGEST = 10**18  # beyond it, sums of sizes overflow
_APP: dict[str, Any] = {"help_format": "plaintext", "version_flags": ()}
_WANTED = {int: "a whole number", float: "a number", str: "text", Path: "a path"}


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str = "",
    choices: Sequence[str] | None = None,
    positional: bool = False,
    run_only: bool = False,
    extends: bool = False,
) -> Any:
    """Makes a dataclass field that says what the command line needs to know about it.

    Args:
        default: the field's default; without one the flag must be given.
        help: one line for ``--help``.
        choices: the values allowed, for text and for tuples of text.
        positional: an argument without a flag.
        run_only: says where or how to run, not what to compute; may change on ``--resume``.
        extends: says which or how many units of work there are, each of them the same whatever the
            others; may grow on ``--resume``: a number, or values beside those before.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "positional": positional,
        "run_only": run_only,
        "extends": extends,
    }
    return dataclasses.field(default=default, metadata=metadata)


def option_of(settings: type, name: str, default: Any = dataclasses.MISSING, **changed: Any) -> Any:
    """Makes a field like one of another settings dataclass.

    Args:
        settings, name: which field.
        default: another default, if given.
        changed: what else differs, see `option`.
    """
    fields: Mapping[str, dataclasses.Field[Any]] = settings.__dataclass_fields__  # type: ignore[attr-defined]
    field = fields[name]
    if default is dataclasses.MISSING:
        default = field.default
    return dataclasses.field(default=default, metadata={**field.metadata, **changed})


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
    ``__post_init__``, ends the process.
    """
    parsed: Settings = _read(_app(settings, prog, description), argv, prog)
    return parsed


def parse_command(
    commands: Mapping[str, tuple[type, str]], argv: Sequence[str] | None = None, *, prog: str
) -> Any:
    """Reads a command line that begins with the name of a command; returns that one's settings.

    Args:
        commands: the settings class and the description of each.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        _fail(f"which experiment? {prog} {{{','.join(commands)}}} ...")
    app = App(name=prog, **_APP)
    for name, (settings, description) in commands.items():
        app.command(_app(settings, name, description))
    return _read(app, argv, prog)


def check_values(
    command: str,
    settings: Any,
    zero: Sequence[str] = (),
    most: Mapping[str, int] = types.MappingProxyType({}),
) -> None:
    """Refuses values outside a field's choices, and numbers out of range; None is accepted.

    Numbers must be above zero, or at least zero for the fields named in ``zero``, and at most what
    ``most`` says.

    Raises:
        ValueError: names the command, the flag and the value.
    """
    for field in dataclasses.fields(settings):
        given, flag = getattr(settings, field.name), flag_of(field.name)
        choices, zero_too = field.metadata.get("choices"), field.name in zero
        for value in given if isinstance(given, tuple) else (given,):
            if choices and value is not None:
                check_choice(command, flag, value, choices)
            elif isinstance(value, float):
                (check_nonnegative if zero_too else check_positive)(command, flag, value)
            elif isinstance(value, int) and not isinstance(value, bool):
                smallest, largest = 0 if zero_too else 1, most.get(field.name)
                check_count(command, flag, value, minimum=smallest, maximum=largest)


def flag_of(name: str) -> str:
    """Returns the flag of a settings field."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """Returns a settings value as one would type it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def unique(values: tuple[Value, ...]) -> tuple[Value, ...]:
    """Returns each value once, in the order of its first occurrence."""
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
        except (RunError, ValueError, ProcessGroupError) as error:
            _fail(str(error))
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            _fail(where + (error.strerror or str(error)))
        except (MemoryError, RuntimeError, OverflowError) as error:
            if not too_large(error):
                raise
            what = str(error).partition("\n")[0]  # in torch's errors a backtrace follows
            _fail(f"not enough memory for these settings, choose smaller ones ({what})")
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)

    return guarded


def _fail(message: str) -> NoReturn:
    rank = int(os.environ.get("RANK", "0"))
    if rank > 0:
        time.sleep(GRACE)
    where = f"error in process {rank}: " if rank > 0 else "error: "
    print(where + " ".join(message.split()), file=sys.stderr)
    sys.exit(WRONG_USE)


def _read(app: App, argv: Sequence[str] | None, prog: str) -> Any:
    from rich.console import Console

    columns = min(shutil.get_terminal_size().columns, HELP_COLUMNS)
    argv = sys.argv[1:] if argv is None else argv
    try:
        parsed = app(
            list(argv),
            console=Console(width=columns),
            print_error=False,
            exit_on_error=False,
            result_action="return_value",
        )
    except CycloptsError as error:
        error.verbose = False
        told = str(error)
        _fail(told if "Did you mean" in told else f"{told.rstrip('.')}; see {prog} --help")
    except (ValueError, TypeError) as error:
        _fail(str(error))
    if parsed is None:  # --help was given
        sys.exit(0)
    return parsed


def _app(settings: type, name: str, description: str) -> App:
    """Makes the app that reads a command line and returns an object of the settings class."""
    hints = typing.get_type_hints(settings)
    fields = sorted(dataclasses.fields(settings), key=_place)
    positional = [field.name for field in fields if field.metadata.get("positional")]

    def make(*arguments: Any, **flags: Any) -> Any:
        return settings(**dict(zip(positional, arguments, strict=False)), **flags)

    make.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [_parameter(field, hints[field.name]) for field in fields]
    )
    app = App(name=name, help=description, **_APP)
    app.default(make)
    return app


def _place(field: dataclasses.Field[Any]) -> int:
    """Puts arguments first in the help, and the fields that say where and how to run last."""
    return 2 * field.metadata.get("run_only", False) - field.metadata.get("positional", False)


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    """Turns a field into a parameter of the function that cyclopts calls."""
    choices, positional = field.metadata.get("choices"), field.metadata.get("positional")
    several = any(typing.get_origin(t) is tuple for t in (hint, *typing.get_args(hint)))
    if choices:
        one = Literal[tuple(choices)]  # type: ignore[valid-type]
        hint = tuple[one, ...] if several else one  # type: ignore[valid-type]
    parameter = Parameter(
        help=field.metadata.get("help", ""),
        converter=None if choices or bool in (hint, *typing.get_args(hint)) else _converted,
        consume_multiple=(1, None) if several else None,
        show_default=False if isinstance(field.default, (bool, type(None))) else shown,
        negative=() if field.default is False else None,
        negative_iterable=(),
        allow_repeating=True,  # the last value counts
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.POSITIONAL_ONLY if positional else inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
        annotation=Annotated[hint, parameter],
    )


def _converted(hint: Any, tokens: Sequence[Token]) -> Any:
    return convert(hint, tokens, _strictly)


def _strictly(kind: Any, text: str) -> Any:
    """Converts one value; cyclopts alone would take 2.5 for a whole number, and round it."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    # Path("") would be the current folder; what cannot be printed cannot be recorded either.
    if value is None or not (text and text.isprintable()):
        raise CoercionError(f"must be {_WANTED[kind]}, got {text!r}")
    if kind is int and abs(value) > _LARGEST:
        raise CoercionError(f"must be at most 10^18, got {text}")
    return value
