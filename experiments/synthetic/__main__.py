"""Command line: python -m experiments.synthetic {linear,shallow,phase} ..."""

from __future__ import annotations

from experiments.lib.experiment import command_of_several
from experiments.synthetic.linear.run import LINEAR
from experiments.synthetic.phase.run import PHASE
from experiments.synthetic.shallow.run import SHALLOW

main = command_of_several(
    "python -m experiments.synthetic", {e.name: e for e in (LINEAR, SHALLOW, PHASE)}
)

if __name__ == "__main__":
    main()
