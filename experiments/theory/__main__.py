"""``python -m experiments.theory``: see ``--help``."""

from experiments.theory.run import main

main()
