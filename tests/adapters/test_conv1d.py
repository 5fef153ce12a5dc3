"""transformers' Conv1D, of which GPT-2 is made, is adapted like nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    base_state_dict,
    merge_and_unload,
    unload,
)
from metalora.nn import MultiTaskLoRALinear, tasks
from tests.hf.models import decoder

pytest.importorskip("transformers", reason="Conv1D is of transformers")

IDS = torch.arange(3, 33).view(5, 6)
TASKS = torch.tensor([1, 0, 2, 1, 0])


def adapted(config=None):
    model = decoder("GPT2LMHeadModel")
    adapt(model, config or LoRAConfig(rank=2, alpha=3), 3)
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        for parameter in layer.own_task_parameters().values():
            nn.init.normal_(parameter, std=0.2)
    return model


def logits(model, ids=None):
    with tasks(TASKS if ids is None else ids):
        return model(input_ids=IDS).logits


def test_all_linear_means_them_and_keeps_their_parameters():
    plain = decoder("GPT2LMHeadModel")
    before, conv1d = dict(plain.named_parameters()), type(plain.transformer.h[0].mlp.c_fc)
    model = adapt(plain, LoRAConfig(rank=2), 3)
    layers = adapted_layers(model)
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert list(layers) == [f"transformer.h.{i}.{kind}" for i in (0, 1) for kind in kinds]
    first = layers["transformer.h.0.attn.c_attn"]
    assert type(first) is MultiTaskLoRALinear
    assert (first.in_features, first.out_features) == (32, 96)
    assert first.lora_A.shape == (3, 2, 32) and first.lora_B.shape == (3, 96, 2)
    assert all(before[n] is p for n, p in model.named_parameters() if "lora" not in n)
    decoder("GPT2LMHeadModel").load_state_dict(base_state_dict(model), strict=True)
    unload(model)
    assert type(model.transformer.h[0].mlp.c_fc) is conv1d
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(before[n] is p for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(rank=2, alpha=3),
        LoRAConfig(rank=2, target_modules=["attn.c_proj"], symmetric=True),
        LoRAConfig(rank=2, target_modules=r".*\.c_(attn|fc)", route="weight"),
        LoRAConfig(rank=2, target_modules=["c_fc", "lm_head"], route="token"),
    ],
)
def test_each_task_computes_what_its_merged_model_does(config):
    model = adapted(config)
    got = logits(model)
    for task in range(3):
        own = merge_and_unload(copy.deepcopy(model), task)
        assert not adapted_layers(own)
        want = own(input_ids=IDS).logits[task == TASKS]
        torch.testing.assert_close(got[task == TASKS], want, rtol=1e-11, atol=1e-11)
    assert (got[0] - logits(model, 0 * TASKS)[0]).abs().max() > 1e-3


def test_shared_weights_get_the_gradients_of_the_plain_model():
    plain = decoder("GPT2LMHeadModel")
    plain(input_ids=IDS).logits.sin().sum().backward()
    model = adapt(decoder("GPT2LMHeadModel"), LoRAConfig(rank=2), 3)  # B = 0
    logits(model).sin().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-10, atol=1e-10)


def test_a_merged_output_embedding_is_tied_no_longer():
    model = adapted(LoRAConfig(rank=2, target_modules=["lm_head", "c_fc"]))
    assert model.config.tie_word_embeddings and model.lm_head.weight is model.transformer.wte.weight
    plain = unload(copy.deepcopy(model))
    assert plain.config.tie_word_embeddings and plain.lm_head.weight is plain.transformer.wte.weight
    own = merge_and_unload(model, 1)
    assert not own.config.tie_word_embeddings


@pytest.mark.parametrize("heads", [["lm_head"], ["wte"]])
def test_tied_embeddings_cannot_be_heads(heads):
    with pytest.raises(ValueError, match=r"shares its weight with .*; untie them first$"):
        adapt(decoder("GPT2LMHeadModel"), LoRAConfig(rank=2, heads=heads), 3)


def test_it_cannot_be_a_head_itself():
    with pytest.raises(ValueError, match=r"a head is made of nn\.Linear layers"):
        adapt(decoder("GPT2LMHeadModel"), LoRAConfig(rank=2, heads=["h.0.mlp.c_fc"]), 3)
