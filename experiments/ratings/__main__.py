"""``python -m experiments.ratings``: see ``--help``."""

from experiments.ratings.run import main

main()
