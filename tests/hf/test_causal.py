"""Causal language models: packed sequences give what they give padded, and one by one."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metalora
from metalora.hf import (
    Packing,
    SequencePasses,
    disable_packing,
    enable_packing,
    packing_problem,
    position_offset,
)
from metalora.hf.attention import packed_attention
from metalora.meta import Batch
from metalora.meta.steps import call_model
from metalora.nn import tasks
from tests.hf.models import DECODERS, decoder, sequences

LENGTHS = [5, 1, 9, 9, 2, 12, 1, 7]
TASKS = torch.tensor([3, 1, 1, 0, 3, 1, 0, 3])  # of 5 tasks two without samples
CPU = torch.device("cpu")
EVERY = pytest.mark.parametrize("name", DECODERS)


@pytest.fixture
def norms_in_float64(monkeypatch):
    """Gemma's norms round to float32, and so sum the gradients of their weights in any order."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def losses(model, packed, max_tokens=10_000, ids=None, lengths=LENGTHS):
    """Each sample's next-token loss, and the gradients of a weighted sum of them."""
    model.zero_grad()
    given = sequences(lengths)
    passes = SequencePasses(
        given, packed=packed, max_tokens=max_tokens, pad_token_id=0,
        position_offset=position_offset(model),
    )  # fmt: skip
    samples = torch.arange(len(lengths))
    ids = torch.zeros_like(samples) if ids is None else ids
    found = torch.zeros(len(lengths), dtype=torch.float64)
    for part in passes(Batch(samples, samples, ids)):
        with tasks(part.task_ids, counts=part.counts, lengths=part.lengths):
            logits = call_model(model, part.inputs)
            rows = logits[0].split(part.lengths) if packed else logits
            total = 0
            for row, sample in zip(rows, part.targets.tolist(), strict=True):
                tokens = given.take(torch.tensor([sample])).fields["input_ids"].long()
                predicted = row[: len(tokens) - 1].double()
                loss = F.cross_entropy(predicted, tokens[1:], reduction="sum")
                found[sample] = loss.detach()
                total = total + (1 + sample) * loss
            total.backward()
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def errors(got, wanted):
    """The largest error of the losses, and of the gradients, each relative to the largest."""
    assert got[1].keys() == wanted[1].keys()
    of_losses = float((got[0] - wanted[0]).abs().max() / wanted[0].abs().max())
    largest = max(float(gradient.abs().max()) for gradient in wanted[1].values())
    of_gradients = max(float((got[1][n].double() - g).abs().max()) for n, g in wanted[1].items())
    return of_losses, of_gradients / largest


def worst(got, wanted):
    return max(errors(got, wanted))


def adapted(model):
    """The model with adapters of five tasks that are not zero."""
    torch.manual_seed(5)
    metalora.adapt(model, metalora.LoRAConfig(rank=2), 5)
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            nn.init.normal_(parameter, std=0.2)
    return model


@EVERY
@pytest.mark.usefixtures("norms_in_float64")
def test_packed_equals_padded_equals_alone(name):
    model = decoder(name)
    before = model.config._attn_implementation
    alone = losses(model, packed=False, max_tokens=1)
    enable_packing(model)
    if name.startswith("Gemma2"):  # transformers has capped scores in "eager", in float32 alone
        single, alone = alone, losses(model, packed=False, max_tokens=1)
        assert worst(single, alone) <= 2e-6
    for packed in (True, False):
        for max_tokens in (10_000, 20, 1):
            assert worst(losses(model, packed, max_tokens), alone) <= 1e-10
    disable_packing(model)
    assert model.config._attn_implementation == before
    single = losses(model, packed=False, max_tokens=1)
    assert worst(single, alone) <= (2e-6 if name.startswith("Gemma2") else 1e-10)


def in_bf16(name):
    """The largest error of packed sequences in bf16, and of transformers' padded ones."""
    model = enable_packing(decoder(name, initializer_range=0.1))
    exact = losses(model, packed=False, max_tokens=1)
    model = decoder(name, initializer_range=0.1, attn_implementation="eager").bfloat16()
    usual = worst(losses(model, packed=False), exact)
    return worst(losses(enable_packing(model), packed=True), exact), usual


@EVERY
def test_bf16_is_as_close_as_transformers_is(name):
    error, usual = in_bf16(name)
    assert error <= max(2 * usual, 0.01)


@EVERY
@pytest.mark.usefixtures("norms_in_float64")
def test_padded_blocks_in_a_model(name, monkeypatch):
    """What a GPU does where its kernel for packed sequences cannot be had."""
    model = enable_packing(decoder(name))
    want = losses(model, packed=True)
    original = Packing.of
    monkeypatch.setattr(Packing, "of", lambda n, device: original(n, device, padded=True))
    assert worst(losses(model, packed=True), want) <= 1e-10


@EVERY
@pytest.mark.usefixtures("norms_in_float64")
def test_tasks_with_adapters(name):
    model = adapted(enable_packing(decoder(name)))
    want = losses(model, packed=False, max_tokens=1, ids=TASKS)
    assert worst(losses(model, packed=True, max_tokens=30, ids=TASKS), want) <= 1e-10


@EVERY
def test_generates_as_before(name):
    """Also from prompts that are padded on the left."""
    model = decoder(name).float()
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids)
    ids[1, :3], mask[1, :3] = 0, 0
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    want = model.generate(ids, **options)
    got = enable_packing(model).generate(ids, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.scores, want.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [4], [1, 1, 1], [6, 6, 6], [40, 1, 33]])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (3, None), (None, 1.5), (35, 0.7)])
def test_attention_agrees_with_a_mask(lengths, padded, heads, window, softcap):
    torch.manual_seed(0)
    total, (many, few) = sum(lengths), heads
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    place = torch.arange(total)
    mask = (of[:, None] == of) & (place[:, None] >= place)
    if window is not None:
        mask &= place[:, None] - place < window
    parts = [
        torch.randn(1, count, total, 8, dtype=torch.float64, requires_grad=True)
        for count in (many, few, few)
    ]
    packing = Packing.of(lengths, CPU, padded=padded)
    got = packed_attention(*parts, packing, scale=0.3, causal=True, window=window, softcap=softcap)
    query, *keys = parts
    key, value = (part.repeat_interleave(many // few, 1) for part in keys)
    scores = 0.3 * query @ key.mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
    want = (weights @ value).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, parts, grad), torch.autograd.grad(want, parts, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_neither_masks_nor_a_cache_for_packed_sequences(monkeypatch):
    made = []
    model = enable_packing(decoder("Qwen2ForCausalLM"))
    monkeypatch.setattr("transformers.masking_utils.sdpa_mask", lambda **given: made.append(given))
    packing = Packing.of([3, 4], CPU)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    output = model(input_ids=positions + 5, position_ids=positions, packing=packing)
    assert output.logits.shape == (1, 7, 99) and output.past_key_values is None
    assert not made


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_gives_the_same():
    model = enable_packing(decoder("LlamaForCausalLM")).train()
    want = losses(model, packed=True)
    model.gradient_checkpointing_enable()
    assert worst(losses(model, packed=True), want) <= 1e-12


def test_a_bert_that_is_a_decoder():
    model = decoder("BertLMHeadModel", is_decoder=True)
    want = losses(model, packed=False)
    assert worst(losses(enable_packing(model), packed=True), want) <= 1e-10


def test_base_models_and_copies():
    model = enable_packing(decoder("LlamaForCausalLM"))
    want = losses(model, packed=True)
    twin = copy.deepcopy(model)
    disable_packing(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert worst(losses(twin, packed=True), want) == 0
    base = enable_packing(decoder("LlamaForCausalLM").model)
    packing, positions = Packing.of([2, 1], CPU), torch.tensor([[0, 1, 0]])
    output = base(input_ids=positions + 5, position_ids=positions, packing=packing)
    assert output.last_hidden_state.shape == (1, 3, 32)


@pytest.mark.exhaustive
def test_a_pickled_model_packs_in_a_process_of_its_own(tmp_path):
    model = enable_packing(decoder("MistralForCausalLM"))
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; from tests.hf.test_causal import losses;"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False);"
        "torch.save(losses(model, True)[0], sys.argv[1] + '/losses.pt')"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    found = torch.load(tmp_path / "losses.pt")
    torch.testing.assert_close(found, losses(model, True)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "Qwen2MoeForCausalLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_of_experts(name, dtype):
    """Whose products are of other sizes where the other sequence has other tokens."""
    options = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts": 4}
    model = decoder(name, **options).to(dtype)
    want = losses(model, packed=False, max_tokens=1)
    got = losses(enable_packing(model), packed=True)
    error = float((got[0] - want[0]).abs().max() / want[0].abs().max())
    assert error <= (1e-4 if dtype == torch.float32 else 0.05)


REFUSED = {
    "Llama4ForCausalLM": "gives other outputs for packed sequences",
    "GptOssForCausalLM": "none with s_aux, which GptOssAttention asks for",
    "BloomForCausalLM": "has an attention of its own, not transformers'",
    "MambaForCausalLM": "MambaForCausalLM ",
    "LlamaForSequenceClassification": "give outputs of every token, [1, 8] of them, got [1, 2]",
    "BartForCausalLM": "BartForCausalLM ",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_say_why(name):
    options = {"num_experts_per_tok": 2, "num_local_experts": 2, "num_key_value_heads": 2}
    model = decoder(name, head_dim=8, **options)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match="^enable_packing: .*" + re.escape(REFUSED[name])):
        enable_packing(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_window_that_attention_is_not_told_of_is_noticed():
    """Though it is longer than the sequences that the model is tried with."""
    model = decoder("Qwen2ForCausalLM", sliding_window=30)
    assert packing_problem(model) is None
    assert (
        model.config.sliding_window == 30 and model.model.layers[1].self_attn.sliding_window == 30
    )
    model.model.layers[1].self_attn.sliding_window = None
    assert packing_problem(model).endswith("gives other outputs for packed sequences")


@pytest.mark.parametrize("see", ["earlier", "later"])
def test_sequences_that_see_each_other_are_noticed(see, monkeypatch):
    """Also in a new model, where attention changes the outputs little."""
    from metalora.hf import attention

    original = attention.packed_attention

    def leaking(query, key, value, packing, **options):
        output = original(query, key, value, packing, **options)
        first = packing.ends[1]
        if see == "earlier":
            output[:, first:] += 1e-9 * output[:, :first].sum()
        else:
            output[:, :first] += 1e-9 * output[:, first:].sum()
        return output

    monkeypatch.setattr(attention, "packed_attention", leaking)
    model = decoder("LlamaForCausalLM", initializer_range=0.02)
    assert packing_problem(model).endswith("lets packed sequences see each other")


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (20, None), (None, 2.0)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_a_gpu(dtype, window, softcap, heads):
    lengths = [5, 1, 200, 9, 64, 130]
    device = torch.device("cuda")
    parts = [
        torch.randn(1, count, sum(lengths), 16, device=device, dtype=dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]
    options = {"causal": True, "window": window, "softcap": softcap}
    got = packed_attention(*parts, Packing.of(lengths, device), **options)
    got.sum().backward()
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    want = packed_attention(*exact, Packing.of(lengths, CPU), **options)
    want.sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 5e-2
    for a, b in zip([got, *(p.grad for p in parts)], [want, *(p.grad for p in exact)], strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=limit, atol=limit)
