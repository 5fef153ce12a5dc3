"""``python -m experiments.conflict``: see ``--help``."""

from experiments.conflict.run import main

main()
