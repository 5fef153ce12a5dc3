"""The loss of causal language models against logits that stand whole, and its means over tasks."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import metalora
from metalora import meta
from metalora.hf import Packing, SequencePasses, Sequences, enable_packing, packing_problem
from metalora.meta import causal
from metalora.meta.causal import (
    IGNORED,
    SampleLosses,
    bits_per_byte,
    causal_lm_losses,
    mean_token_loss,
    perplexity,
    token_losses,
)
from metalora.nn import MultiTaskHead, MultiTaskLoRALinear
from tests.pairs import every_pair

V, H, T = 11, 6, 3
IDS = torch.tensor([0, 1, 1, 2])


def case(dtype=torch.float64, samples=4, length=7):
    torch.manual_seed(0)
    hidden = torch.randn(samples, length, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(V, (samples, length))
    labels[0, :3] = labels[2] = labels[3, 5] = IGNORED  # a prompt, a whole sample, one token
    return hidden, labels


def whole(hidden, labels, head, softcap=None):
    logits = head(hidden)
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def heads(dtype=torch.float64):
    torch.manual_seed(1)
    lora = MultiTaskLoRALinear(H, V, T, 2, dtype=dtype)
    nn.init.normal_(lora.lora_B)
    return {
        "plain": nn.Linear(H, V, bias=False, dtype=dtype),
        "bias": nn.Linear(H, V, dtype=dtype),
        "lora": lora,
        "head per task": MultiTaskHead(H, V, T, dtype=dtype),
        "several layers": nn.Sequential(
            nn.Linear(H, 5, dtype=dtype), nn.Tanh(), nn.Linear(5, V, dtype=dtype)
        ),
    }


def gradients(losses, hidden, head):
    weights = torch.linspace(0.5, 2, losses.numel(), dtype=losses.dtype).view(losses.shape)
    wanted = [hidden, *head.parameters()]
    return torch.autograd.grad((losses * weights).sum(), wanted)


@every_pair(head=list(heads()), chunk_tokens=[1, 4, 100], softcap=[None, 1.5])
def test_equals_the_logits_that_stand_whole(head, chunk_tokens, softcap):
    hidden, labels = case()
    layer = heads()[head]
    with metalora.tasks(IDS):
        found = token_losses(hidden, labels, layer, chunk_tokens=chunk_tokens, softcap=softcap)
        wanted = whole(hidden, labels, layer, softcap)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert float(found.detach()[2].abs().sum()) == 0
    with metalora.tasks(IDS):
        expected = gradients(wanted, hidden, layer)
    for one, other in zip(gradients(found, hidden, layer), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("head", heads())
def test_all_rows_may_be_computed(head, monkeypatch):
    """As on a GPU, where the host does not know which rows have a label."""
    hidden, labels = case()
    layer = heads()[head]
    with metalora.tasks(IDS):
        wanted = token_losses(hidden, labels, layer, chunk_tokens=5)
        monkeypatch.setattr(causal, "_labelled", lambda labels: None)
        found = token_losses(hidden, labels, layer, chunk_tokens=5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    expected = gradients(wanted, hidden, layer)
    for one, other in zip(gradients(found, hidden, layer), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("size", [0, 3])
def test_batches_without_a_label(size):
    hidden = torch.randn(size, 4, H, dtype=torch.float64, requires_grad=True)
    layer = heads()["bias"]
    losses = token_losses(hidden, torch.full((size, 4), IGNORED), layer)
    losses.sum().backward()
    assert losses.shape == (size, 4) and float(losses.detach().sum()) == 0
    assert float(layer.weight.grad.abs().sum()) == 0


def test_gradients_are_exact():
    hidden, labels = case(length=6)
    layer = heads()["bias"]

    def losses(hidden, *parameters):
        return token_losses(hidden, labels, layer, chunk_tokens=5)

    assert torch.autograd.gradcheck(losses, (hidden, *layer.parameters()))


@pytest.mark.parametrize("trained", [0, 1, 2])
def test_only_what_needs_a_gradient_gets_one(trained):
    hidden, labels = case()
    layer = heads()["bias"]
    parts = [hidden, layer.weight, layer.bias]
    for number, part in enumerate(parts):
        part.requires_grad_(number == trained)
    token_losses(hidden, labels, layer, chunk_tokens=4).sum().backward()
    assert [part.grad is not None for part in parts] == [i == trained for i in range(3)]


class Watched(nn.Linear):
    """Remembers how many rows it was called with."""

    def forward(self, x):
        self.__dict__.setdefault("rows", []).append(len(x))
        return super().forward(x)


def test_logits_of_a_chunk_exist_at_a_time_and_none_of_ignored_tokens():
    hidden, labels = case(length=50)
    layer = Watched(H, V, dtype=torch.float64)
    token_losses(hidden, labels, layer, chunk_tokens=16).sum().backward()
    assert max(layer.rows) <= 16
    assert sum(layer.rows) == 2 * int((labels != IGNORED).sum())  # forward and backward


def test_tied_embeddings_get_both_gradients():
    torch.manual_seed(0)
    embedding, layer = nn.Embedding(V, H).double(), nn.Linear(H, V, bias=False)
    layer.weight = embedding.weight
    ids, (_, labels) = torch.randint(V, (4, 7)), case()
    found = {}
    for name, function in {"chunks": token_losses, "whole": whole}.items():
        embedding.zero_grad()
        function(embedding(ids).tanh(), labels, layer).mean().backward()
        found[name] = embedding.weight.grad.clone()
    torch.testing.assert_close(found["chunks"], found["whole"], rtol=1e-12, atol=1e-14)


def test_bf16_autocast_errs_no_more_than_whole_logits():
    torch.manual_seed(0)
    exact, labels = torch.randn(8, 64, 32, dtype=torch.float64), torch.randint(500, (8, 64))
    layer = nn.Linear(32, 500, bias=False).double()
    short = nn.Linear(32, 500, bias=False)
    short.weight.data.copy_(layer.weight)
    layer.weight.data.copy_(short.weight)

    def run(function, hidden, head):
        hidden = hidden.detach().clone().requires_grad_()
        losses = function(hidden, labels, head)
        return losses, *torch.autograd.grad(losses.mean(), [hidden, head.weight])

    wanted = run(whole, exact, layer)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run(whole, exact.float(), short)
    with torch.autocast("cpu", torch.bfloat16):
        ours = run(lambda *a: token_losses(*a, chunk_tokens=32), exact.float(), short)
    assert ours[0].dtype == torch.float32
    assert not torch.equal(ours[0].double(), wanted[0])  # autocast did something
    for one, other, true in zip(ours, plain, wanted, strict=True):
        error, allowed = (one - true).norm(), 2 * (other - true).norm()
        assert error <= allowed


def test_all_tasks_of_all_chunks_are_stepped():
    """`TaskOptimizer` must not take the last chunk's tasks for those of the whole batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(H, H), nn.Linear(H, V)).double()
    metalora.adapt(model, metalora.LoRAConfig(rank=2, target_modules=["0", "1"]), T)
    nn.init.normal_(model[1].lora_B)
    optimizer = metalora.TaskOptimizer(model, torch.optim.AdamW, lr=0.1)
    before = model[1].lora_A.detach().clone()
    hidden, labels = case()
    ids = torch.tensor([0, 2, 2, 2])
    with metalora.tasks(ids):
        losses = token_losses(model[0](hidden.detach()), labels, model[1], chunk_tokens=2)
    losses.sum().backward()
    optimizer.step()
    changed = (model[1].lora_A != before).flatten(1).any(1)
    assert changed.tolist() == [True, False, True]


def test_adapters_with_dropout_drop_the_same_in_backward():
    torch.manual_seed(0)
    hidden = torch.randn(4, 7, H, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (4, 7))
    layer = MultiTaskLoRALinear(H, V, T, 2, dropout=0.5, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    found = {}
    for name, function in {"whole": whole, "chunk": token_losses}.items():
        torch.manual_seed(3)
        with metalora.tasks(IDS):
            losses = function(hidden, labels, layer)
        torch.manual_seed(4)  # between forward and backward something else is drawn
        before = torch.get_rng_state()
        found[name] = losses, *gradients(losses, hidden, layer)
        assert torch.equal(torch.get_rng_state(), before)
    with metalora.tasks(IDS):
        assert not torch.allclose(found["chunk"][0], whole(hidden, labels, layer.eval()))
    for one, other in zip(found["chunk"], found["whole"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_shapes_and_labels_are_checked():
    hidden, labels = case()
    layer = heads()["plain"]
    with pytest.raises(ValueError, match=re.escape("got [4, 7, 6] and torch.int64 [4, 6]")):
        token_losses(hidden, labels[:, 1:], layer)
    with pytest.raises(ValueError, match=re.escape("torch.int32 [4, 7]")):
        token_losses(hidden, labels.int(), layer)
    with pytest.raises(ValueError, match=re.escape("labels must be -100 or in 0..10")):
        token_losses(hidden, labels.clamp(min=V), layer)
    with pytest.raises(ValueError, match="chunk_tokens must be an int >= 1, got 0"):
        token_losses(hidden, labels, layer, chunk_tokens=0)


# Models of transformers


def llama(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    kind = options.pop("kind", "Llama")
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).double()
    for parameter in model.parameters():  # their own start hardly tells tokens apart
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def sentences(lengths=(5, 3, 7, 4)):
    """Sequences of unequal length, the first with a prompt of two tokens."""
    torch.manual_seed(2)
    parts = [torch.randint(V, (n,)) for n in lengths]
    labels = [part.clone() for part in parts]
    labels[0][:2] = IGNORED
    return parts, labels


def padded(parts, labels):
    pad = nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(parts, True, 0),
        "attention_mask": pad([torch.ones_like(part) for part in parts], True),
        "labels": pad(labels, True, IGNORED),
    }


MODELS = {
    "Llama": {},
    "tied": {"tie_word_embeddings": True},
    "Gemma2": {"kind": "Gemma2", "head_dim": 4, "final_logit_softcapping": 0.5},
    "GPTNeoX": {"kind": "GPTNeoX"},
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_loss_of_transformers(name):
    model = llama(**MODELS[name])
    parts, labels = sentences()
    inputs = padded(parts, labels)
    found = causal_lm_losses(model, inputs, chunk_tokens=3)
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits
    for number, of_sample in enumerate(labels):
        own = F.cross_entropy(logits[number, : len(of_sample) - 1], of_sample[1:])
        torch.testing.assert_close(found.mean[number], own, rtol=1e-10, atol=1e-12)
    assert found.tokens.tolist() == [3, 2, 6, 3]  # the first token is predicted from nothing
    theirs = model(**inputs).loss
    ours = (found.mean * found.tokens).sum() / found.tokens.sum()
    torch.testing.assert_close(ours.float(), theirs)  # transformers' is in float32
    found.mean.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_other_logits_are_refused():
    model = llama(kind="Granite", logits_scaling=3.0)
    with pytest.raises(ValueError, match="logits of GraniteForCausalLM are not its output layer"):
        causal_lm_losses(model, padded(*sentences()))


def test_other_models_are_refused():
    transformers = pytest.importorskip("transformers")
    sizes = {
        f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "ffn_dim")
    }
    config = transformers.BartConfig(vocab_size=V, d_model=16, **sizes)
    with pytest.raises(ValueError, match="got BartForConditionalGeneration"):
        causal_lm_losses(transformers.BartForConditionalGeneration(config), padded(*sentences()))
    model = llama()
    model.model.forward = lambda **inputs: inputs["pixels"]
    with pytest.raises(ValueError, match="LlamaForCausalLM is no causal language model of tokens"):
        causal_lm_losses(model, padded(*sentences()))
    with pytest.raises(ValueError, match="must be a causal language model of transformers"):
        causal_lm_losses(nn.Linear(2, 2), padded(*sentences()))
    with pytest.raises(ValueError, match="inputs must have 'labels', got"):
        causal_lm_losses(llama(), {"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    model = llama()
    model.compile()
    with pytest.raises(ValueError, match="the model is compiled"):
        causal_lm_losses(model, padded(*sentences()))


LORA = metalora.LoRAConfig(rank=2, target_modules="all-linear")


def adapted(**options):
    model = metalora.adapt(llama(**options), LORA, T)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def loss_of_round(model):
    parts, labels = sentences()
    with metalora.tasks(IDS):
        means, tokens = causal_lm_losses(model, padded(parts, labels))
    return metalora.task_mean(means, IDS, sizes=tokens)


def test_a_task_s_loss_is_the_mean_over_its_tokens_or_its_samples():
    model, (parts, labels) = adapted(), sentences()
    nats, counts = [], []
    for task, part, of_sample in zip(IDS.tolist(), parts, labels, strict=True):
        with metalora.tasks(torch.tensor([task])):
            logits = model(part[None]).logits[0, :-1]
        nats.append(F.cross_entropy(logits, of_sample[1:], reduction="sum"))
        counts.append(int((of_sample[1:] != IGNORED).sum()))
    over_tokens = nats[0] / counts[0] + (nats[1] + nats[2]) / (counts[1] + counts[2])
    over_tokens = (over_tokens + nats[3] / counts[3]) / 3
    torch.testing.assert_close(loss_of_round(model), over_tokens, rtol=1e-10, atol=0)
    with metalora.tasks(IDS):
        means, _ = causal_lm_losses(model, padded(parts, labels))
    over_samples = nats[0] / counts[0] + (nats[1] / counts[1] + nats[2] / counts[2]) / 2
    over_samples = (over_samples + nats[3] / counts[3]) / 3
    torch.testing.assert_close(metalora.task_mean(means, IDS), over_samples, rtol=1e-10, atol=0)
    assert not torch.isclose(over_tokens, over_samples, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_tasks(reentrant):
    """transformers runs each layer again in backward: with the adapters of its own tasks."""
    wanted, model = adapted().train(), adapted().train()
    loss_of_round(wanted).backward()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of_round(model).backward()
    for (name, one), other in zip(model.named_parameters(), wanted.parameters(), strict=True):
        assert other.grad.abs().sum() > 0, name
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-12)


def test_packed_equals_padded():
    model, (parts, labels) = adapted(), sentences()
    problem = packing_problem(model)
    if problem is not None:
        pytest.skip(problem)
    wanted = loss_of_round(model)
    expected = torch.autograd.grad(wanted, list(model.parameters()))
    enable_packing(model)
    lengths = [len(part) for part in parts]
    inputs = {
        "input_ids": torch.cat(parts)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "packing": Packing.of(lengths, torch.device("cpu")),
    }
    with metalora.tasks(IDS, lengths=lengths):
        means, tokens = causal_lm_losses(model, inputs)
    found = metalora.task_mean(means, IDS, sizes=tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=0)
    for one, other in zip(
        torch.autograd.grad(found, list(model.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


def loader(sizes, order="rounds", batch_size=2, collated=True):
    lengths = [5, 3, 7, 4, 6, 2]
    parts, labels = sentences(lengths)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    sequences = Sequences({"input_ids": torch.cat(parts), "labels": torch.cat(labels)}, starts)
    passes = SequencePasses(
        sequences, packed=False, max_tokens=8, pad_token_id=0, position_offset=0
    )
    numbers = torch.arange(len(lengths))
    return meta.RoundLoader(
        numbers,
        numbers,
        torch.tensor([0, 0, 1, 1, 2, 2]),
        batch_size=batch_size,
        order=order,
        shuffle=False,
        collate=passes,
        sizes=sizes,
    )


TOKENS = torch.tensor([3, 2, 6, 3, 5, 1])


@every_pair(over=["tokens", "samples"], order=["rounds", "pooled"], step_per=["round", "task"])
def test_a_training_takes_the_mean_over_tokens_or_samples(over, order, step_per):
    """The loss and the gradients of `lora_ml`'s first step, in several passes, are eq. 5's."""
    if (order, step_per) == ("pooled", "task"):
        return
    sizes = TOKENS if over == "tokens" else None
    rounds = loader(sizes, order, 6 if order == "pooled" else 2)
    calls = {"forward": causal_lm_losses, "loss": mean_token_loss}
    config = meta.TrainConfig(epochs=1, lr=1e-2, step_per=step_per)
    model = llama()
    losses = []

    class Losses(meta.Callback):
        def on_step(self, training, loss):
            losses.append(float(loss))

    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    meta.standard(model, rounds, config, callbacks=[Losses()], **calls)
    plain = llama()
    plain.load_state_dict(start, strict=False)
    nats, counts = [], []
    for part, of_sample in zip(*sentences([5, 3, 7, 4, 6, 2]), strict=True):
        found = causal_lm_losses(plain, {"input_ids": part[None], "labels": of_sample[None]})
        nats.append(float(found.mean.detach()) * int(found.tokens))
        counts.append(int(found.tokens))
    groups = [range(6)] if order == "pooled" else [(0, 1), (2, 3), (4, 5)]
    means = []
    for group in groups:
        if over == "tokens":
            means.append(sum(nats[i] for i in group) / sum(counts[i] for i in group))
        else:
            means.append(sum(nats[i] / counts[i] for i in group) / len(group))
    first = means[0] if step_per == "task" else sum(means) / len(means)
    assert losses[0] == pytest.approx(first, rel=1e-10)
    assert len(losses) == (3 if step_per == "task" else 1)


def test_perplexity_and_bits_per_byte():
    model = llama()
    nats, counts = [], []
    for part, labels in zip(*sentences([5, 3, 7, 4, 6, 2]), strict=True):
        found = causal_lm_losses(model, {"input_ids": part[None], "labels": labels[None]})
        nats.append(float(found.mean.detach()) * int(found.tokens))
        counts.append(int(found.tokens))
    of_task = [(nats[i] + nats[i + 1], counts[i] + counts[i + 1]) for i in (0, 2, 4)]
    by_token = meta.evaluate(model, loader(TOKENS), mean_token_loss, forward=causal_lm_losses)
    found = perplexity(by_token)
    wanted = [math.exp(nats / tokens) for nats, tokens in of_task]
    assert found.per_task == pytest.approx(wanted, rel=1e-10)
    assert found.mean == pytest.approx(sum(wanted) / 3, rel=1e-10)
    by_byte = meta.evaluate(model, loader(2 * TOKENS), bits_per_byte, forward=causal_lm_losses)
    wanted = [nats / math.log(2) / (2 * tokens) for nats, tokens in of_task]
    assert by_byte.per_task == pytest.approx(wanted, rel=1e-10)
    batch = next(iter(loader(None)))
    with pytest.raises(ValueError, match="the loader must have sizes, the bytes of each sample"):
        bits_per_byte(SampleLosses(torch.ones(2), torch.ones(2)), batch)


def test_labels_below_the_vocabulary_are_refused_on_each_path(monkeypatch):
    hidden, labels = case()
    labels[1, 2] = -1
    message = re.escape(
        "token_losses: labels must be -100 or in 0..10, the head's vocabulary, got -1"
    )
    with pytest.raises(ValueError, match=message):
        token_losses(hidden, labels, heads()["plain"])
    monkeypatch.setattr("metalora.meta.causal._labelled", lambda labels: None)
    with pytest.raises(ValueError, match=message):
        token_losses(hidden, labels, heads()["plain"], chunk_tokens=3)


def test_a_head_may_have_no_parameters():
    hidden, labels = case()
    fixed = heads()["plain"].requires_grad_(False)

    class Fixed(nn.Module):
        def forward(self, rows):
            return rows @ fixed.weight.T

    want, got = (token_losses(hidden, labels, head) for head in (fixed, Fixed()))
    assert torch.equal(got, want)
    gradients = [torch.autograd.grad(losses.sum(), hidden)[0] for losses in (want, got)]
    assert torch.equal(*gradients) and gradients[0].any()


def test_the_perplexity_of_no_task_is_nan():
    found = perplexity(meta.Evaluation((math.nan, math.nan), math.nan))
    assert math.isnan(found.mean) and all(map(math.isnan, found.per_task))


def test_wrappers_whose_forward_would_be_left_out_are_refused():
    model = llama()
    parallel = nn.parallel.DistributedDataParallel
    wrapped = parallel.__new__(parallel)  # which a process group would be needed for
    nn.Module.__init__(wrapped)
    wrapped.module = model
    with pytest.raises(ValueError, match="put it around a module whose forward calls causal_lm_l"):
        causal_lm_losses(wrapped, padded(*sentences()))
    with pytest.raises(ValueError, match="the model is compiled"):
        causal_lm_losses(torch.compile(model, backend="eager"), padded(*sentences()))
