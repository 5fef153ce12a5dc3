"""Command line: python -m experiments.synthetic {linear,shallow} --vary {T,n,N,k,d,all} ..."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from experiments import cli
from experiments.synthetic import linear, shallow
from metalora._checks import did_you_mean

PROG = "python -m experiments.synthetic"
MODELS = {"linear": linear.main, "shallow": shallow.main}


@cli.main_guard
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the experiment named by the first argument."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    models = "{" + ",".join(MODELS) + "}"
    if not arguments:
        raise ValueError(f"which model? {PROG} {models} ...")
    model, *rest = arguments
    if model in ("-h", "--help"):
        print(f"usage: {PROG} {models} ...; {PROG} <model> --help lists its settings")
        return
    if model not in MODELS:
        raise ValueError(
            f"model must be one of {models}, got {model!r}{did_you_mean(model, MODELS)}"
        )
    MODELS[model](rest, prog=f"{PROG} {model}")


if __name__ == "__main__":
    main()
