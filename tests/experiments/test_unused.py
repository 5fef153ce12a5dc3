"""Settings that do nothing in a run, or less than they say, are named."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from experiments.language import settings as language
from experiments.lib.unused import at_most, cut, unused
from experiments.synthetic.linear.settings import LinearSettings
from experiments.synthetic.phase.settings import PhaseSettings
from experiments.synthetic.shallow.settings import ShallowSettings
from experiments.theory import settings as theory
from experiments.vision import settings as vision

MODULES: dict[str, tuple[Any, type]] = {
    "language": (language, language.Settings),
    "vision": (vision, vision.Settings),
    "theory": (theory, theory.TheorySettings),
}


@pytest.mark.parametrize("name", MODULES)
def test_part_of_names_fields_and_what_a_run_can_have(name: str) -> None:
    module, settings = MODULES[name]
    fields = {field.name for field in dataclasses.fields(settings)}
    kinds: set[str] = set()
    for constant in ("METHODS", "FINETUNES", "DEFAULTS", "STATEMENTS", "CONTROLS"):
        kinds.update(getattr(module, constant, ()))
    for field, readers in module.PART_OF.items():
        assert field in fields
        assert set(readers) <= kinds


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (language.Settings(rank=(4,), retrain=("lora-ml",)), []),
        (language.Settings(rank=(4,), retrain=("standard",)), []),  # followed by LoRA
        (language.Settings(rank=(4,), retrain=("last-layer-ml",)), ["--rank"]),
        (language.Settings(standard_order="blocked", retrain=("reptile",)), ["--standard-order"]),
        (language.Settings(lr=1.0, epochs=3, retrain=("reptile",)), ["--lr"]),
        (language.Settings(epochs=3, retrain=("none",)), ["--epochs"]),
        (vision.Settings(shared_head="refit", retrain=("lora-ml",)), ["--shared-head"]),
        (vision.Settings(reptile="paper", retrain=("standard",)), ["--reptile"]),
        (vision.Settings(data_root=Path("x"), data="digits"), ["--data-root"]),
        (vision.Settings(), []),
    ],
)
def test_what_nothing_in_the_run_reads_is_said(settings: Any, said: list[str]) -> None:
    module = language if isinstance(settings, language.Settings) else vision
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
