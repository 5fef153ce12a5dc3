"""Summary of a conflict run, and its table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.lib import training

ACCURACY, VALIDATION, RATE = "accuracy", "validation", "learning_rate"
RETRAINING = "validation_last"
COLUMNS = (
    "experiment",
    "data",
    "inputs",
    "turned",
    "method",
    "finetune",
    "shots",
    "trial",
    "metric",
    "value",
)
KEY = ("inputs", "turned", "method", "finetune", "shots")
