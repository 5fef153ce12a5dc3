"""``python -m experiments.text``: see ``--help``."""

from experiments.text.run import main

main()
