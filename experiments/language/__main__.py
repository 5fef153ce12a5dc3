"""``python -m experiments.language``: see ``--help``."""

from experiments.language.run import main

main()
