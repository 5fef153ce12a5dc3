"""Packed sequences give what they give padded, and alone."""

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
from tests.hf.models import PAD, SIZES, bert, roberta, sequences

LENGTHS = [5, 1, 9, 9, 2, 12, 1, 7]
BOTH = pytest.mark.parametrize("model", [roberta, bert])
CPU = torch.device("cpu")


def passes_of(model, packed, lengths=LENGTHS, max_tokens=10_000, per_sample=1):
    pad = model.config.pad_token_id
    return SequencePasses(
        sequences(lengths, per_sample),
        packed=packed,
        max_tokens=max_tokens,
        pad_token_id=pad,
        position_offset=position_offset(model),
    )


def batch_of(size, ids=None):
    return Batch(
        torch.arange(size), torch.arange(size), torch.zeros(size).long() if ids is None else ids
    )


def outputs(model, passes, batch=None):
    """Logits in the order of the samples, and the gradients of a function of them."""
    model.zero_grad()
    rows = {}
    batch = batch_of(len(LENGTHS)) if batch is None else batch
    for part in passes(batch):
        with tasks(part.task_ids, counts=part.counts, lengths=part.lengths):
            logits = call_model(model, part.inputs)
            value = (logits.sin() * (1 + part.targets.repeat_interleave(2).view_as(logits))).sum()
            value.backward()
        rows |= dict(zip(part.targets.tolist(), logits.detach(), strict=True))
    logits = torch.stack([rows[i] for i in range(len(rows))])
    return logits, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(got, wanted, limit):
    torch.testing.assert_close(got[0], wanted[0], rtol=limit, atol=limit)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in got[1].items():
        scale = float(wanted[1][name].abs().max()) + 0.1  # of key biases it is 0
        assert float((gradient - wanted[1][name]).abs().max()) <= limit * scale, name


@BOTH
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-11), (torch.float32, 3e-4)])
def test_packed_equals_padded_equals_alone(model, dtype, limit):
    model = model(attn_implementation="eager").to(dtype).eval()
    alone = outputs(model, passes_of(model, packed=False, max_tokens=1))
    for max_tokens in (10_000, 20):
        padded = outputs(model, passes_of(model, packed=False, max_tokens=max_tokens))
        assert_close(padded, alone, limit)
    enable_packing(model)
    for packed in (True, False):
        for max_tokens in (10_000, 20, 1):
            got = outputs(model, passes_of(model, packed=packed, max_tokens=max_tokens))
            assert_close(got, alone, limit)
    disable_packing(model)
    assert model.config._attn_implementation == "eager"
    assert_close(outputs(model, passes_of(model, packed=False, max_tokens=1)), alone, 0)


@pytest.mark.parametrize("lengths", [LENGTHS, [1], [4], [1, 1, 1], [6, 6, 6], [30, 1, 1, 1]])
@pytest.mark.parametrize("padded", [False, True])
def test_attention_stays_inside_each_sequence(lengths, padded):
    total = sum(lengths)
    of = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    parts = [torch.randn(1, 3, total, 8, dtype=torch.float64, requires_grad=True) for _ in "qkv"]
    packing = Packing.of(lengths, CPU, padded=padded)
    assert bool(packing.blocks) == padded
    got = packed_attention(*parts, packing, scale=0.3)
    mask = of[:, None] == of
    want = F.scaled_dot_product_attention(*parts, mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, parts, weights),
        torch.autograd.grad(want, parts, weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_dropout_keeps_the_expectation(padded):
    lengths = [40, 30, 45, 38]
    ones = torch.ones(1, 8, sum(lengths), 8)
    got = packed_attention(*[ones] * 3, Packing.of(lengths, CPU, padded=padded), dropout=0.5)
    assert float(got.std()) > 0.05
    assert float(got.mean()) == pytest.approx(1, abs=0.02)


def test_blocks_are_few_and_little_padded():
    torch.manual_seed(1)
    lengths = torch.randint(20, 120, (200,)).tolist()
    packing = Packing.of(lengths, CPU, padded=True)
    places = sum(size * length for size, length, _ in packing.blocks)
    assert len(packing.blocks) == 4
    assert sum(lengths) < places < 1.25 * sum(lengths)


@BOTH
def test_padded_blocks_in_a_model(model, monkeypatch):
    """What a GPU does where its kernel for packed sequences cannot be had."""
    model = enable_packing(model().eval())
    want = outputs(model, passes_of(model, packed=True))
    original = Packing.of
    monkeypatch.setattr(Packing, "of", lambda n, device: original(n, device, padded=True))
    assert_close(outputs(model, passes_of(model, packed=True)), want, 1e-11)


@pytest.mark.parametrize("lengths", [[1], [7]])
def test_a_batch_of_one(lengths):
    model = roberta().eval()
    padded = outputs(model, passes_of(model, False, lengths), batch_of(1))
    enable_packing(model)
    assert_close(outputs(model, passes_of(model, True, lengths), batch_of(1)), padded, 1e-12)


def test_adapters_before_and_after_with_absent_tasks():
    """Task ids in any order, of 5 tasks two without samples."""
    ids = torch.tensor([3, 1, 1, 0, 3, 1, 0, 3])
    config = metalora.LoRAConfig(rank=2, heads=["classifier.out_proj"])
    results = []
    for order in ("plain", "adapt, enable", "enable, adapt", "adapt, enable, remove"):
        model = roberta().eval()
        if order.startswith("enable"):
            enable_packing(model)
        torch.manual_seed(5)
        metalora.adapt(model, config, 5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.2)
        if "adapt, enable" in order:
            enable_packing(model)
        packed = order != "plain"
        if "remove" not in order:
            passes = passes_of(model, packed, max_tokens=30)
            results.append(outputs(model, passes, batch_of(len(ids), ids)))
            continue
        metalora.merge_and_unload(model, 3)
        got = outputs(model, passes_of(model, True))[0]
        torch.testing.assert_close(got[ids == 3], results[0][0][ids == 3], rtol=1e-11, atol=1e-11)
    assert_close(results[1], results[0], 1e-11)
    assert_close(results[2], results[0], 1e-11)


def test_the_last_layer_drops_other_tokens_early():
    model, seen = enable_packing(roberta().eval()), {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            note = lambda module, args, name=name: seen.update({name: args[0].shape})  # noqa: E731
            module.register_forward_pre_hook(note)
    outputs(model, passes_of(model, True))
    first, last = (f"roberta.encoder.layer.{i}.output.dense" for i in (0, 1))
    assert list(seen[first][:2]) == [1, sum(LENGTHS)]
    assert list(seen[last][:2]) == [len(LENGTHS), 1]


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
def test_gradient_checkpointing_gives_the_same():
    model = enable_packing(roberta(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    want = outputs(model.train(), passes_of(model, True))
    model.gradient_checkpointing_enable()
    assert_close(outputs(model, passes_of(model, True)), want, 1e-12)


def test_bf16_autocast_is_close():
    model = roberta(initializer_range=0.1).float().eval()
    want, _ = outputs(model, passes_of(model, False))
    enable_packing(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, gradients = outputs(model, passes_of(model, True))
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.03 * float(want.abs().max()))
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_models_it_leaves_as_they_were(tmp_path):
    plain = roberta()
    model = enable_packing(copy.deepcopy(plain))
    assert enable_packing(model) is model
    twin = copy.deepcopy(model)
    want = outputs(model.eval(), passes_of(model, True))
    assert_close(outputs(twin.eval(), passes_of(twin, True)), want, 0)
    disable_packing(model)
    assert_close(outputs(twin, passes_of(twin, True)), want, 0)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert vars(model).keys() == vars(plain).keys()
    twin.save_pretrained(tmp_path)
    assert "metalora" not in (tmp_path / "config.json").read_text()
    again = type(plain).from_pretrained(tmp_path)
    assert again.config._attn_implementation == plain.config._attn_implementation == "sdpa"
    disable_packing(twin)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert disable_packing(again) is again


@pytest.mark.exhaustive
def test_a_pickled_model_packs_in_a_process_of_its_own(tmp_path):
    model = enable_packing(roberta().eval())
    want = outputs(model, passes_of(model, True))[0]
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch; from tests.hf.test_packing import outputs, passes_of;"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False);"
        "torch.save(outputs(model, passes_of(model, True))[0], sys.argv[1] + '/logits.pt')"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_trying_a_model_changes_nothing(training):
    model = roberta().train(training)
    state = torch.get_rng_state()
    assert packing_problem(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training is training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks for module in model.modules())
    enable_packing(model)
    assert packing_problem(model) is None
    assert model.config._attn_implementation == "metalora"


REFUSED = {
    "ModernBertForSequenceClassification": (
        "none with sliding_window in both directions, which ModernBertAttention asks for"
    ),
    "MPNetForSequenceClassification": "has an attention of its own, not transformers'",
    "RobertaForTokenClassification": r"gives [2, 1, 2] instead of [2, 5, 2]",
}


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_say_why(name):
    transformers = pytest.importorskip("transformers")
    options = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} | SIZES
    if name.startswith("Modern"):
        options |= {"cls_token_id": 1, "sep_token_id": 2}
    model_type = getattr(transformers, name)
    model = model_type(model_type.config_class(**options))
    before = model.config._attn_implementation
    assert REFUSED[name] in packing_problem(model)
    with pytest.raises(ValueError, match="^enable_packing: .*" + re.escape(REFUSED[name])):
        enable_packing(model)
    assert model.config._attn_implementation == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@BOTH
def test_attention_that_ignores_packing_is_noticed(model):
    """Also in a new model, where attention changes the outputs little."""
    model = model(initializer_range=0.02)
    for layer in model.base_model.encoder.layer:
        original = layer.attention.self.forward
        layer.attention.self.forward = lambda *args, original=original, packing=None, **kwargs: (
            original(*args, **kwargs)
        )
    assert packing_problem(model).endswith("lets packed sequences see each other")


def test_wrong_positions_are_noticed():
    model = roberta()
    model.roberta.embeddings.position_embeddings.padding_idx = 3
    assert "gives other outputs" in packing_problem(model)


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match=r"must be one of transformers, got Linear$"):
        enable_packing(nn.Linear(2, 2))
    assert packing_problem(nn.Linear(2, 2)) == "model must be one of transformers, got Linear"
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 4}
    vit = transformers.ViTModel(transformers.ViTConfig(**sizes, intermediate_size=8, patch_size=2))
    wanted = "ViTModel is no model of token sequences: its configuration has no vocab_size"
    assert packing_problem(vit) == wanted
    assert disable_packing(nn.Linear(2, 2)).in_features == 2


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_attention_on_a_gpu(dtype, dropout):
    device = torch.device("cuda")
    lengths = [5, 1, 200, 9, 64, 130]
    parts = [torch.randn(1, 3, sum(lengths), 16, device=device, dtype=dtype) for _ in "qkv"]
    if dropout:
        parts = [torch.ones_like(part) for part in parts]
    parts = [part.requires_grad_() for part in parts]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = packed_attention(*parts, Packing.of(lengths, device), dropout=dropout)
        got.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if dropout:
        assert float(got.float().mean()) == pytest.approx(1, abs=0.1)
        return
    exact = [part.detach().double().cpu().requires_grad_() for part in parts]
    want = packed_attention(*exact, Packing.of(lengths, CPU))
    want.sum().backward()
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    for a, b in zip([got, *(p.grad for p in parts)], [want, *(p.grad for p in exact)], strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=limit, atol=limit)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [True, False])
def test_targets_and_tasks_may_be_on_the_gpu_already(packed):
    passes = SequencePasses(
        sequences(LENGTHS), packed=packed, max_tokens=30, pad_token_id=PAD,
        position_offset=2, device="cuda",
    )  # fmt: skip
    samples = torch.arange(len(LENGTHS))
    there = {"targets": samples.cuda(), "weights": torch.rand(len(LENGTHS), device="cuda")}
    parts = list(passes(Batch(samples, task_ids=(samples % 2).cuda(), **there)))
    rows = torch.cat([part.targets for part in parts])
    assert rows.is_cuda and sorted(rows.tolist()) == samples.tolist()
    assert torch.equal(torch.cat([part.weights for part in parts]), there["weights"][rows])


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("packed", [True, False])
def test_a_pass_on_a_gpu_never_waits(model, packed):
    model = enable_packing(model().float().cuda())
    passes = SequencePasses(
        sequences(LENGTHS), packed=packed, max_tokens=30, pad_token_id=PAD,
        position_offset=position_offset(model), device="cuda",
    )  # fmt: skip
    metalora.adapt(model, metalora.LoRAConfig(rank=2, heads=["classifier"]), 2)
    batch = batch_of(len(LENGTHS), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1]))
    with torch.autocast("cuda", torch.bfloat16):
        outputs(model, passes, batch)  # whatever has to be done once
        torch.cuda.set_sync_debug_mode("error")
        try:
            for part in passes(batch):
                with tasks(part.task_ids, counts=part.counts, lengths=part.lengths):
                    call_model(model, part.inputs).float().sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
