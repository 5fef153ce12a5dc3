"""Embeddings and last layers of a vocabulary's size that exist once per task."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from metalora.adapters import (
    LoRAConfig,
    adapt,
    base_state_dict,
    load_task_state_dict,
    merge_and_unload,
    task_state_dict,
    unload,
)
from metalora.nn import MultiTaskEmbedding, MultiTaskHead, TaskBatch, tasks

T, V, D = 3, 11, 4


def embedding(padding_idx=None):
    torch.manual_seed(0)
    plain = nn.Embedding(V, D, padding_idx=padding_idx).double()
    layer = MultiTaskEmbedding.from_embedding(plain, T, name="tokens")
    nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("shape", [(5,), (5, 6), (10, 3), (5, 2, 3)])
@pytest.mark.filterwarnings("ignore:sample order")
def test_each_sample_has_the_rows_of_its_task(shape, padding_idx):
    layer, ids = embedding(padding_idx), torch.randint(V, shape)
    of = torch.tensor([1, 0, 2, 1, 0])
    each = of.repeat_interleave(shape[0] // 5).tolist()
    got = layer(ids, TaskBatch(of, T))
    want = torch.stack(
        [
            F.embedding(row, layer.weight[task], padding_idx)
            for row, task in zip(ids, each, strict=True)
        ]
    )
    assert torch.equal(got, want)
    grad = torch.randn_like(want)
    (ours,) = torch.autograd.grad(got, layer.weight, grad)
    (right,) = torch.autograd.grad(want, layer.weight, grad)
    torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dims", [1, 2])
def test_packed_samples(dims):
    layer, ids = embedding(), torch.randint(V, (7,))
    batch = TaskBatch(torch.tensor([0, 0, 2]), T, lengths=(3, 0, 4))
    got = layer(ids if dims == 1 else ids[None], batch)
    want = torch.cat([layer.weight[0][ids[:3]], layer.weight[2][ids[3:]]])
    assert torch.equal(got.view(7, D), want) and got.shape[:-1] == ((7,) if dims == 1 else (1, 7))


def test_one_task_needs_none_and_no_samples_give_none():
    layer = MultiTaskEmbedding.from_embedding(nn.Embedding(V, D), 1)
    ids = torch.randint(V, (2, 3))
    assert torch.equal(layer(ids), layer.weight[0][ids])
    none = embedding()(ids[:0], TaskBatch(torch.zeros(0, dtype=torch.int64), T))
    assert none.shape == (0, 3, D)
    with pytest.raises(ValueError, match="'tokens': which task does each sample belong to"):
        embedding()(ids)


@pytest.mark.parametrize("wrong", [-1, V, V + 3, -V])
@pytest.mark.parametrize("kind", ["samples", "packed", "one task"])
def test_ids_outside_read_no_row_of_another_task(kind, wrong):
    layer, ids = embedding(), torch.zeros(5, dtype=torch.int64)
    batch = TaskBatch(torch.tensor([1, 0, 2, 1, 0]), T)
    if kind == "packed":
        batch = TaskBatch(torch.tensor([0, 1]), T, lengths=(2, 3))
    elif kind == "one task":
        layer, batch = MultiTaskEmbedding.from_embedding(nn.Embedding(V, D), 1, name="tokens"), None
    ids[3] = wrong
    message = f"'tokens': ids must be in 0..10, the places of the embedding, got {wrong}; "
    with pytest.raises(IndexError, match=re.escape(message)) as caught:
        layer(ids, batch)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_ids_outside_are_refused_in_compiled_code():
    layer, batch = embedding(), TaskBatch(torch.tensor([0, 1]), T)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[3, 0], [V - 1, 2]])
    assert torch.equal(compiled(ids, batch), layer(ids, batch))
    for wrong in (-1, V):
        with pytest.raises(IndexError):
            compiled(torch.full((2, 2), wrong), batch)


def test_fake_ids_are_not_read():
    layer, batch = embedding(), TaskBatch(torch.tensor([0, 1]), T)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        ids = mode.from_tensor(torch.tensor([[3, 0], [V - 1, 2]]))
        assert layer(ids, batch).shape == (2, 2, D)


@pytest.mark.gpu
def test_on_a_gpu_nothing_waits_and_ids_outside_end_in_an_assertion():
    layer, batch = embedding().cuda(), TaskBatch(torch.tensor([0, 1]), T)
    ids = torch.tensor([[3, 0], [V - 1, 2]], device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = layer(ids, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got[1], layer.weight[1][ids[1]])
    program = (
        "import torch; from metalora.nn import MultiTaskEmbedding, TaskBatch; "
        f"layer = MultiTaskEmbedding.from_embedding(torch.nn.Embedding({V}, {D}), {T}).cuda(); "
        f"layer(torch.full((2, 2), {V}).cuda(), TaskBatch(torch.tensor([0, 1]), {T})); "
        "torch.cuda.synchronize()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode and "device-side assert" in run.stderr, run.stderr


def test_ids_of_tasks_are_kept_on_the_device_of_the_inputs(monkeypatch):
    asked = []
    real = TaskBatch.ids_on
    monkeypatch.setattr(
        TaskBatch, "ids_on", lambda self, device: asked.append(device) or real(self, device)
    )
    embedding()(torch.zeros(2, 3, dtype=torch.int64), TaskBatch(torch.tensor([0, 1]), T))
    assert asked == [torch.device("cpu")]


class Model(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        torch.manual_seed(2)
        self.tokens, self.out = nn.Embedding(V, D, padding_idx=0), nn.Linear(D, V, bias=False)
        if tie:
            self.out.weight = self.tokens.weight

    def forward(self, ids):
        return self.out(self.tokens(ids).sin())


def test_in_a_model():
    plain, ids = Model(), torch.randint(V, (5, 6))
    want = plain(ids)
    model = adapt(Model(), LoRAConfig(target_modules=(), heads=["tokens", "out"]), T)
    of = torch.tensor([1, 0, 2, 1, 0])
    with tasks(of):
        torch.testing.assert_close(model(ids), want)
        nn.init.normal_(model.tokens.weight)
        got = model(ids)
    state = task_state_dict(model, 1)
    assert {n: tuple(t.shape) for n, t in state.items()} == {
        "tokens.weight": (V, D), "out.weight": (V, D),
    }  # fmt: skip
    base = base_state_dict(model)
    torch.testing.assert_close(base["tokens.weight"], model.tokens.weight.mean(0))
    Model().load_state_dict(base, strict=True)
    load_task_state_dict(model, 0, state)
    own = merge_and_unload(model, 0)
    assert type(own.tokens) is nn.Embedding and own.tokens.padding_idx == 0
    torch.testing.assert_close(own(ids)[of == 1], got[of == 1])


def test_it_is_drawn_afresh_with_a_zero_for_padding():
    layer = embedding(padding_idx=2)
    layer.reset_task_parameters()
    assert not layer.weight[:, 2].any() and layer.weight[:, 3].all()
    assert unload(adapt(Model(), LoRAConfig(rank=1), T)).tokens.padding_idx == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.tokens, "max_norm", 1.0), "its max_norm, scale_grad_by_freq and"),
        (lambda m: m.tokens.register_forward_hook(print), "it has hooks"),
        (lambda m: setattr(m, "out", nn.Linear(D, V)) or setattr(
            m.out, "weight", m.tokens.weight), "shares its weight with 'out'"),
        (lambda m: setattr(m, "tokens", type("Mine", (nn.Embedding,), {})(V, D)), "it is a Mine"),
    ],
)  # fmt: skip
def test_embeddings_that_cannot_be_heads(change, message):
    model = Model()
    change(model)
    with pytest.raises(ValueError, match=f"^adapt: heads: 'tokens' .*{message}"):
        adapt(model, LoRAConfig(target_modules=(), heads=["tokens"]), T)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_head_of_a_vocabulary_is_multiplied_task_by_task(bias, packed, monkeypatch):
    torch.manual_seed(0)
    head = MultiTaskHead(D, 7, T, bias=bias, dtype=torch.float64)
    x = torch.randn((1, 9, D) if packed else (5, 2, D), dtype=torch.float64, requires_grad=True)
    if packed:
        batch = TaskBatch(torch.tensor([0, 0, 2]), T, lengths=(3, 2, 4))
    else:
        batch = TaskBatch(torch.tensor([2, 0, 2, 1, 0]), T)
    want = head(x, batch)
    grad = torch.randn_like(want)
    parameters = (x, *head.parameters())
    gradients = torch.autograd.grad(want, parameters, grad)
    monkeypatch.setattr("metalora.nn.head._FEW", 0)
    monkeypatch.setattr("metalora.nn.head._PER_HEAD", 60)
    monkeypatch.setattr(F, "linear", _counted := Counted(F.linear))
    got = head(x, batch)
    assert _counted.shapes == [(7, D)] * T
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, parameters, grad), gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class Counted:
    def __init__(self, function):
        self.function, self.shapes = function, []

    def __call__(self, x, weight, bias=None):
        self.shapes.append(tuple(weight.shape))
        return self.function(x, weight, bias)
