"""Our own configuration."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"rank": 0}, ValueError, "LoRAConfig: rank must be an int >= 1, got 0"),
        ({"rank": "8"}, TypeError, "LoRAConfig: rank must be an int >= 1, got str"),
        ({"alpha": float("nan")}, ValueError, "LoRAConfig: alpha must be a finite number > 0"),
        ({"alpha": -1}, ValueError, "LoRAConfig: alpha must be"),
        ({"dropout": 1}, ValueError, "LoRAConfig: dropout must be in [0, 1), got 1"),
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


def test_numbers_of_numpy_and_of_tensors_are_taken_as_plain_ones():
    config = LoRAConfig(rank=np.int64(4), alpha=np.float32(0.5), dropout=np.float32(0.25))
    assert (config.rank, config.alpha, config.dropout) == (4, 0.5, 0.25)
    assert {type(config.rank), type(config.alpha), type(config.dropout)} == {int, float}
    assert type(LoRAConfig(alpha=16).alpha) is int  # as it was given
    layer = adapt(
        nn.Sequential(nn.Linear(2, 2)), LoRAConfig(rank=1), torch.tensor([0, 2]).max() + 1
    )
    assert layer[0].num_tasks == 3
    assert type(layer[0].num_tasks) is int
    for wrong in (np.float32(4), np.bool_(True), torch.tensor(True), torch.tensor(2.0), "4"):
        with pytest.raises(TypeError, match="LoRAConfig: rank must be an int >= 1, got"):
            LoRAConfig(rank=wrong)
