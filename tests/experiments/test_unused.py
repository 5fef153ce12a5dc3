"""Settings that do nothing in a run, or less than they say, are named."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.language import settings as language
from experiments.language.settings import LanguageSettings
from experiments.lib.retraining_settings import FINETUNES, REFIT
from experiments.lib.unused import at_most, cut, unused
from experiments.ratings import settings as ratings
from experiments.ratings.settings import RatingsSettings
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.phase.settings import PhaseSettings
from experiments.synthetic.shallow.settings import ShallowSettings
from experiments.theory import settings as theory
from experiments.vision import settings as vision
from experiments.vision.settings import VisionSettings

HEADS: dict[str, Any] = {
    "retrain": ("last-layer-ml",),
    "finetune": (),
    "shared_head": "refit",
}
MODULES: dict[str, tuple[Any, type]] = {
    "language": (language, LanguageSettings),
    "vision": (vision, VisionSettings),
    "ratings": (ratings, RatingsSettings),
    "theory": (theory, theory.TheorySettings),
}


@pytest.mark.parametrize("name", MODULES)
def test_part_of_names_fields_and_what_a_run_can_have(name: str) -> None:
    module, settings = MODULES[name]
    fields = {field.name for field in dataclasses.fields(settings)}
    kinds: set[str] = set()
    for constant in ("DEFAULTS", "STATEMENTS", "CONTROLS"):
        kinds.update(getattr(module, constant, ()))
    kinds.update(getattr(settings, "methods", ()), FINETUNES, [REFIT])
    for field, readers in module.PART_OF.items():
        assert field in fields
        assert set(readers) <= kinds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (LanguageSettings(rank=(4,), retrain=("lora-ml",)), []),
        (LanguageSettings(rank=(4,), retrain=("standard",)), []),  # followed by LoRA
        (LanguageSettings(rank=(4,), retrain=("last-layer-ml",)), ["--rank"]),
        (
            LanguageSettings(standard_order="blocked", retrain=("reptile",)),
            ["--standard-order"],
        ),
        (LanguageSettings(lr=1.0, epochs=3, retrain=("reptile",)), ["--lr"]),
        (LanguageSettings(epochs=3, retrain=("none",)), ["--epochs"]),
        (VisionSettings(shared_head="refit", retrain=("lora-ml",)), ["--shared-head"]),
        (VisionSettings(**HEADS, finetune_epochs=3), []),
        (VisionSettings(**HEADS, rank=3, evaluate_every=2), ["--evaluate-every", "--rank"]),
        (
            VisionSettings(**{**HEADS, "retrain": ("standard",)}, finetune_epochs=3),
            ["--shared-head", "--finetune-epochs"],
        ),
        (RatingsSettings(**HEADS, finetune_weight_decay=3.0), ["--finetune-weight-decay"]),
        (VisionSettings(reptile="paper", retrain=("standard",)), ["--reptile"]),
        (VisionSettings(data_root=Path("x"), data="digits"), ["--data-root"]),
        (VisionSettings(), []),
    ],
)
def test_what_nothing_in_the_run_reads_is_said(settings: Any, said: list[str]) -> None:
    module = sys.modules[type(settings).__module__]
    lines = unused(settings, module.PART_OF, settings.kinds())
    assert [line.split()[1] for line in lines] == said


def test_what_smoke_cuts_is_said() -> None:
    for settings, said in (
        (LinearSettings(smoke=True), []),
        (LinearSettings(outer_steps=500), []),
        (
            LinearSettings(smoke=True, outer_steps=500, trials=1, finetune_steps=30),
            ["note: --outer-steps 500 is cut to 20 by --smoke"],
        ),
        (
            ShallowSettings(smoke=True, retrain_epochs=30),
            ["note: --retrain-epochs 30 is cut to 20 by --smoke"],
        ),
        (
            PhaseSettings(smoke=True, tasks=(2, 3, 4, 5)),
            ["note: --tasks 2 3 4 5 is cut to 2 3 4 by --smoke"],
        ),
    ):
        assert cut(settings, settings.shortened()) == said


def test_more_than_there_is() -> None:
    assert at_most("turns", None, 3, "the dialogues have") == []
    assert at_most("turns", 3, 3, "the dialogues have") == []
    assert at_most("turns", 4, 3, "the dialogues have") == [
        "note: --turns 4: the dialogues have at most 3, so all are used"
    ]
