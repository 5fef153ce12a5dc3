"""Command line: python -m experiments.synthetic {linear,shallow,phase} ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments.lib import cli
from experiments.synthetic import linear, phase, shallow
from metalora._checks import did_you_mean

PROG = "python -m experiments.synthetic"
EXPERIMENTS = {"linear": linear.main, "shallow": shallow.main, "phase": phase.main}


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment named by the first argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    names = "{" + ",".join(EXPERIMENTS) + "}"
    if not arguments:
        raise ValueError(f"which experiment? {PROG} {names} ...")
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(f"usage: {PROG} {names} ...\n\n{PROG} <experiment> --help lists its settings.")
        return
    if name not in EXPERIMENTS:
        raise ValueError(
            f"experiment must be one of {names}, got {name!r}{did_you_mean(name, EXPERIMENTS)}"
        )
    EXPERIMENTS[name](rest, prog=f"{PROG} {name}")


if __name__ == "__main__":
    main()
