"""Where each experiment is defined, by the name that its manifests have."""

from __future__ import annotations

import importlib
from typing import Any

from experiments.lib.errors import RunError
from experiments.lib.experiment import Experiment

# Each module has the `Experiment` in capitals, with _ for -; it is imported when it is needed.
MODULES = {
    "conflict": "experiments.conflict.run",
    "language": "experiments.language.run",
    "language-start": "experiments.language.start",
    "linear": "experiments.synthetic.linear.run",
    "phase": "experiments.synthetic.phase.run",
    "ratings": "experiments.ratings.run",
    "ratings-choose": "experiments.ratings.choose",
    "shallow": "experiments.synthetic.shallow.run",
    "text": "experiments.text.run",
    "theory": "experiments.theory.run",
    "vision": "experiments.vision.run",
}


def experiment(name: str) -> Experiment[Any]:
    """Returns the experiment of this name.

    Raises:
        RunError: there is none, or it has no tables for the documentation.
    """
    if name not in MODULES:
        raise RunError(f"no experiment is called {name!r}; there are {', '.join(MODULES)}")
    module = importlib.import_module(MODULES[name])
    found: Experiment[Any] = getattr(module, name.upper().replace("-", "_"))
    if found.report is None:
        raise RunError(f"the experiment {name!r} has no tables for the documentation")
    return found
