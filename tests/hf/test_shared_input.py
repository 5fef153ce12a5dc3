"""In models of transformers, queries, keys and values share their input, and gate and up theirs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import metalora
from metalora.nn import shared_input
from tests.hf.models import bert, decoder
from tests.ops.problems import relative_error

MODELS: dict[str, tuple[Callable[[], Any], str, int]] = {  # and how many readers follow another
    "BERT": (bert, r".*\.encoder\..*\.(query|key|value|dense)", 2 * 2),
    "Llama": (lambda: decoder("LlamaForCausalLM"), r".*_proj", 2 * (2 + 1)),
    "Llama, queries and values": (lambda: decoder("LlamaForCausalLM"), r".*\.[qv]_proj", 2),
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_equal_and_added_in_products(name, monkeypatch):
    make, targets, followers = MODELS[name]
    ids = torch.randint(3, 99, (6, 7))
    found = []
    for devices in (["cpu"], []):
        monkeypatch.setattr(shared_input, "SHARING_DEVICES", devices)
        torch.manual_seed(0)
        config = metalora.LoRAConfig(rank=2, target_modules=targets, route="weight")
        model = metalora.adapt(make(), config, 3).eval()
        for parameter in metalora.adapters.task_parameters(model):
            nn.init.normal_(parameter, std=0.1)
        with metalora.tasks(torch.tensor([0, 0, 1, 1, 2, 2])), torch.profiler.profile() as profile:
            logits = model(input_ids=ids).logits
            logits.square().sum().backward()
        products = sum(event.name == "aten::baddbmm_" for event in profile.events())
        assert products == (followers if devices else 0)
        found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for got, wanted in zip(*found, strict=True):
        if wanted.norm() > 1e-12:  # that of a bias of keys is 0 but for rounding
            assert relative_error(got, wanted) < 1e-12
