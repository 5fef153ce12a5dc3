"""Causal language models in PEFT, and as merged weights."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from metalora.adapters import LoRAConfig, adapt, merge_and_unload, task_parameters
from metalora.io import export_peft, import_peft
from metalora.nn import tasks
from tests.hf.models import decoder

peft = pytest.importorskip("peft", reason="PEFT folders need the package peft")
transformers = pytest.importorskip("transformers", reason="PEFT folders need transformers")

PROMPTS = torch.arange(5, 25).view(4, 5)
CASES = {
    "llama": ("LlamaForCausalLM", LoRAConfig(rank=3, alpha=5)),
    "llama, tied": (
        "LlamaForCausalLM, tied", LoRAConfig(rank=3, target_modules=["q_proj", "lm_head"])
    ),
    "llama, heads": (
        "LlamaForCausalLM",
        LoRAConfig(rank=3, target_modules=["v_proj"], heads=["lm_head", "embed_tokens"]),
    ),
    "llama, heads alone": (
        "LlamaForCausalLM", LoRAConfig(target_modules=(), heads=["embed_tokens"])
    ),
    "gpt2": ("GPT2LMHeadModel", LoRAConfig(rank=3, alpha=5)),
    "gpt2, both": ("GPT2LMHeadModel", LoRAConfig(rank=3, target_modules=["c_fc", "lm_head"])),
    "gemma2": ("Gemma2ForCausalLM", LoRAConfig(rank=3, target_modules=r".*_proj")),
}  # fmt: skip
EVERY = pytest.mark.parametrize("case", CASES)


def adapted(case, num_tasks=2):
    name, config = CASES[case]
    name, _, tied = name.partition(", ")
    options = {"tie_word_embeddings": bool(tied)} if name.startswith("Llama") else {}
    model = adapt(decoder(name, **options).float(), config, num_tasks)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in task_parameters(model):
            parameter.normal_(std=0.3)
    return model


def logits(model, task=None):
    if task is None:
        return model(input_ids=PROMPTS).logits.detach()
    with tasks(torch.full((4,), task)):
        return model(input_ids=PROMPTS).logits.detach()


def generated(model, task=None):
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    if task is None:
        return model.generate(input_ids=PROMPTS, **options)
    with tasks(torch.full((4,), task)):
        return model.generate(input_ids=PROMPTS, **options)


def assert_close(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@EVERY
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_peft_generates_the_same(case, tmp_path):
    model = adapted(case)
    folders = export_peft(model, tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    back = import_peft(load(tmp_path / "out/base").eval(), folders)
    for task, folder in enumerate(folders):
        theirs = peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        assert_close(logits(theirs), logits(model, task))
        assert_close(logits(back, task), logits(model, task))
        assert torch.equal(generated(theirs), generated(model, task))
    assert (logits(model, 0) - logits(model, 1)).abs().max() > 1e-2


@EVERY
def test_merged_weights_are_loaded_by_transformers(case, tmp_path):
    """Also where the output embedding was tied to the inputs' and got a weight of its own."""
    model = adapted(case)
    wanted, tokens = logits(model, 1), generated(model, 1)
    merge_and_unload(model, 1).save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_close(logits(again), wanted)
    assert torch.equal(generated(again), tokens)


@pytest.mark.parametrize("case", ["llama, tied", "gpt2, both"])
def test_the_exported_base_stays_tied(case, tmp_path):
    model = adapted(case)
    export_peft(model, tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_what_peft_wrote_for_conv1d_and_embeddings_is_imported(tmp_path):
    base = decoder("GPT2LMHeadModel").float()
    untied = decoder("LlamaForCausalLM", tie_word_embeddings=False).float()
    for number, (model, fields) in enumerate(
        [
            (base, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
            (
                untied,
                {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
            ),
        ]
    ):
        config = peft.LoraConfig(r=2, lora_alpha=3, task_type="CAUSAL_LM", **fields)
        theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.2)
        folder = tmp_path / str(number)
        theirs.save_pretrained(folder)
        assert_close(logits(import_peft(model, folder)), logits(theirs))


def test_untied_heads_of_a_result_that_peft_is_configured_for(tmp_path):
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]
    )
    model = adapt(decoder("LlamaForCausalLM", tie_word_embeddings=False).float(), config, 2)
    folder = export_peft(model, tmp_path / "out")[0]
    found = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(found["modules_to_save"]) == ["lm_head", "model.embed_tokens"]
