"""Command line: python -m experiments.synthetic {linear,shallow,phase} ..."""

from __future__ import annotations

from experiments.lib.experiment import command
from experiments.synthetic.linear.run import LINEAR
from experiments.synthetic.phase.run import PHASE
from experiments.synthetic.shallow.run import SHALLOW

main = command("python -m experiments.synthetic", LINEAR, SHALLOW, PHASE)

if __name__ == "__main__":
    main()
