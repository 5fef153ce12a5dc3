"""Compiled trainings: compiled once for all batches, with the results of others."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from torch import nn

from metalora._library import native_available
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Checkpoint,
    RoundLoader,
    TrainConfig,
    compiling,
    evaluate,
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    peft_ml,
    reptile,
    standard,
)
from metalora.meta.steps import call_model

CONFIG = TrainConfig(2, 0.01, compile=True)
LORA = LoRAConfig(rank=2)
METHODS = {
    "standard": standard,
    "lora-ml": partial(lora_ml, lora_config=LORA),
    "last-layer-ml": partial(last_layer_ml, heads=["head"]),
    "reptile": partial(reptile, inner_steps=2),
    "finetune-lora": partial(finetune_lora, lora_config=LORA),
    "finetune-last-layer": partial(finetune_last_layer, heads=["head"]),
}
needs_native = pytest.mark.skipif(
    not native_available(), reason="the reference asks task_ptr for its values"
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x)).mean(1)


def rounds(count=40, seed=0, **options):
    """Three tasks of 2, 4 and 34 in 40 samples: few rounds have all of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, 8, generator=generator)
    ids = (torch.arange(count) * 20 // count).clamp_max(2)
    options = {"batch_size": 7, "seed": 1, **options}
    return RoundLoader(inputs, (inputs[:, 0, 0] > 0).long(), ids, **options)


def halves(batch):
    """Passes of unequal size, in the order of the tasks."""
    size = (len(batch.task_ids) + 2) // 3
    for rows in filter(len, torch.arange(len(batch.task_ids)).tensor_split([size])):
        yield batch.take(rows, tuple(torch.bincount(batch.task_ids[rows]).tolist()))


@pytest.fixture
def graphs(monkeypatch):
    """Returns the number of compilations since then; only traced, as a C++ compiler takes long."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(compiling, "_check_compiler", lambda device: None)
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def train_both(method, source, **fields):
    """The results and the weights of an eager and of a compiled training."""
    found = []
    for compile in (False, True):
        model, config = Network(), replace(CONFIG, compile=compile, **fields)
        result = METHODS[method](model, source, config, validation=rounds(23, 5, batch_size=9))
        found += [result, model.state_dict()]
    return found


CASES = [*((method, "fp32") for method in METHODS), ("lora-ml", "bf16")]


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), CASES)
def test_compiles_twice_at_most_and_changes_nothing(method, precision, graphs):
    want, weights, got, compiled = train_both(
        method, rounds(collate=halves), precision=precision
    )
    assert graphs() == 2, "one compilation for training, one for evaluation"
    assert compiled.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(compiled[name], weight, msg=name)
    losses = [record["loss"] for record in got.history]
    assert losses == pytest.approx([record["loss"] for record in want.history])
