"""PEFT's configuration: converted, or refused by the name of the field."""

import dataclasses
import re

import pytest
import torch
from torch import nn

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    as_lora_config,
    load_task_state_dict,
)
from metalora.nn import MultiTaskHead, tasks
from tests.hf.models import decoder

peft = pytest.importorskip("peft", reason="conversion of PEFT's configuration needs peft")


def test_peft_config_is_converted():
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        lora_dropout=0.1,
        target_modules=["query"],
        exclude_modules=["0.query"],
        modules_to_save=["classifier"],
        task_type="SEQ_CLS",
    )
    assert as_lora_config(config) == LoRAConfig(
        rank=4,
        alpha=12,
        dropout=0.1,
        target_modules=("query",),
        exclude_modules=("0.query",),
        heads=("classifier",),
    )
    assert as_lora_config(peft.LoraConfig(target_modules="All-Linear")).target_modules == (
        "all-linear"
    )
    stabilised = as_lora_config(
        peft.LoraConfig(r=16, lora_alpha=8, use_rslora=True, target_modules="all-linear")
    )
    assert stabilised.alpha / stabilised.rank == pytest.approx(8 / 16**0.5)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights='gaussian'"),
        ({"rank_pattern": {"query": 2}}, "rank_pattern={'query': 2}"),
        ({"alpha_pattern": {"query": 2}}, "alpha_pattern"),
        ({"layers_to_transform": [0], "target_modules": ["a"]}, "layers_to_transform=[0]"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=[1]"),
        ({"target_parameters": ["a"]}, "target_parameters=['a']"),
        ({"layer_replication": [(0, 1)]}, "layer_replication"),
    ],
)
def test_peft_fields_that_are_not_supported_are_refused_by_name(fields, named):
    config = peft.LoraConfig(**{"target_modules": "all-linear", **fields})
    with pytest.raises(ValueError, match=re.escape(f"peft.LoraConfig field {named}")):
        as_lora_config(config)


def test_a_transposed_weight_is_that_of_conv1d_alone():
    config = peft.LoraConfig(target_modules="all-linear", fan_in_fan_out=True)
    with pytest.raises(
        ValueError, match=r"^adapt: peft\.LoraConfig field fan_in_fan_out=True is for"
    ):
        adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), config, 2)
    assert adapted_layers(adapt(decoder("GPT2LMHeadModel"), config, 2))


KNOWN = {"target_modules", "r", "lora_alpha", "lora_dropout", "exclude_modules", "modules_to_save"}
KNOWN |= {"use_rslora"}
DESCRIPTIVE = {"task_type", "peft_type", "auto_mapping", "peft_version", "revision"}
DESCRIPTIVE |= {"base_model_name_or_path", "inference_mode", "megatron_core", "fan_in_fan_out"}
FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}


@pytest.mark.parametrize("name", sorted(FIELDS - KNOWN - DESCRIPTIVE))
def test_every_field_that_is_not_known_is_refused_by_name(name):
    config = peft.LoraConfig(target_modules=["query"])
    setattr(config, name, "something")
    with pytest.raises(ValueError, match=f"^adapt: peft.LoraConfig field {name}='something' is"):
        as_lora_config(config)


def test_fields_that_only_describe_change_nothing():
    plain = as_lora_config(peft.LoraConfig(target_modules=["query"]))
    described = peft.LoraConfig(
        target_modules=["query"], task_type="CAUSAL_LM", base_model_name_or_path="a/b",
        inference_mode=True, revision="main", auto_mapping={}, megatron_core="core",
    )  # fmt: skip
    assert as_lora_config(described) == plain


def test_peft_choices_that_are_left_to_peft_are_refused():
    with pytest.raises(ValueError, match="target_modules=None leaves the choice to peft"):
        as_lora_config(peft.LoraConfig())
    with pytest.raises(ValueError, match=r"modules_to_save=\['classifier'\]"):
        as_lora_config(peft.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS"))
    with pytest.raises(ValueError, match=r"modules_to_save=\['qa_outputs'\]"):
        as_lora_config(peft.LoraConfig(target_modules="all-linear", task_type="QUESTION_ANS"))


def test_another_peft_method_is_refused():
    with pytest.raises(TypeError, match="got IA3Config"):
        as_lora_config(peft.IA3Config())


def test_a_pattern_that_means_other_layers_too_is_refused():
    model = nn.Sequential(nn.Embedding(4, 5), nn.Linear(5, 2))
    message = r"'.' also means '0', a Embedding, which cannot get an adapter; narrow the pattern"
    with pytest.raises(ValueError, match=re.escape(message)):
        adapt(model, peft.LoraConfig(target_modules="."), 2)
    assert type(model[1]) is nn.Linear
    assert type(adapt(model, LoRAConfig(rank=2, target_modules="."), 2)[0]) is nn.Embedding


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["0"], r"[02]"])
def test_a_task_computes_what_peft_does_with_the_same_weights(targets, rslora):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, modules_to_save=["4"], use_rslora=rslora
    )
    theirs = peft.get_peft_model(mlp().double(), config)
    ours = adapt(mlp().double(), config, 3)
    torch.manual_seed(1)
    state = {}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora" in name or "modules_to_save" in name:
                nn.init.normal_(parameter)
                name = name.removeprefix("base_model.model.")
                name = re.sub(r"(lora_.)\.default\.weight", r"\1", name)
                state[name.replace("modules_to_save.default.", "")] = parameter
    load_task_state_dict(ours, 1, state)
    assert type(ours[4]) is MultiTaskHead
    x = torch.randn(6, 5, dtype=torch.float64)
    with tasks(torch.tensor([1, 0, 1, 1, 2, 1])):
        got = ours(x)
    mine = torch.tensor([0, 2, 3, 5])
    torch.testing.assert_close(got[mine], theirs(x)[mine], rtol=0, atol=1e-12)
    assert not torch.allclose(got[1], theirs(x)[1])
