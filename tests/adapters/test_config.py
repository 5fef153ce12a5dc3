"""Our own configuration."""

import re

import pytest

from metalora.adapters import LoRAConfig


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "LoRAConfig: rank must be an int >= 1, got 0"),
        ({"rank": "8"}, TypeError, "LoRAConfig: rank must be an int >= 1, got str"),
        ({"alpha": float("nan")}, ValueError, "LoRAConfig: alpha must be a finite number > 0"),
        ({"alpha": -1}, ValueError, "LoRAConfig: alpha must be"),
        ({"dropout": 1}, ValueError, "LoRAConfig: dropout must be >= 0 and < 1, got 1"),
        ({"dropout": 0.1, "symmetric": True}, ValueError, "symmetric adapters have no dropout"),
        ({"route": "fast"}, ValueError, "route must be one of"),
        ({"target_modules": 3}, TypeError, "target_modules must be a list of names, got int 3"),
        ({"target_modules": [""]}, TypeError, "target_modules must hold non-empty names"),
        ({"heads": "head"}, TypeError, "heads must be a list of names, got str 'head'"),
    ],
)
def test_bad_settings_are_refused(fields, error, message):
    with pytest.raises(error, match=re.escape(message)):
        LoRAConfig(**fields)


def test_names_become_a_tuple_in_a_fixed_order():
    assert LoRAConfig(target_modules=["b", "a"]).target_modules == ("b", "a")
    assert LoRAConfig(target_modules={"b", "a", "c"}).target_modules == ("a", "b", "c")
