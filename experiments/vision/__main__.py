"""``python -m experiments.vision``: see ``--help``."""

from experiments.vision.run import main

main()
