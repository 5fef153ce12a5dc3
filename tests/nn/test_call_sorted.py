"""One permutation per call of a model, where its layers would sort one by one."""

import copy
import re
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import metalora
from metalora.adapters import LoRAConfig, adapt
from metalora.meta import TaskOptimizer
from metalora.nn import TaskBatch, call_sorted, current_tasks, keep_tasks, tasks
from tests.hf.models import bert, roberta
from tests.nn.test_compile import needs_native
from tests.pairs import every_pair

IDS = torch.tensor([2, 0, 1, 2, 0, 2, 1])


class Block(nn.Module):
    """Layers with a task's part and without one, and a look at the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.plain, self.adapted = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return x + self.adapted(torch.tanh(self.plain(self.norm(x)))) + x.mean(1, keepdim=True)


class Network(nn.Module):
    def __init__(self, depth=3, checkpointed=False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(8, 2)
        self.checkpointed = checkpointed

    def forward(self, x, scale=None):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        x = x if scale is None else x * scale[:, None, None]
        return {"logits": self.head(x[:, 0]), "states": (x, [x.mean(1)]), "size": 8, "none": None}


def network(dropout=0.0, **options):
    torch.manual_seed(0)
    model = Network(**options).double()
    adapt(model, LoRAConfig(2, dropout=dropout, target_modules=["adapted"], heads=["head"]), 3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def inputs():
    torch.manual_seed(1)
    x, scale = torch.randn(7, 5, 8), torch.rand(7)
    return x.double().requires_grad_(), scale.double().requires_grad_()


def gradients(model, given, outputs):
    leaves = [*model.parameters(), *given]
    total = outputs["logits"].sin().sum() + outputs["states"][1][0].square().sum()
    return torch.autograd.grad(total, leaves)


def layer_by_layer(model, *args, **kwargs):
    return model(*args, **kwargs)


def assert_same(model, other, call=call_sorted, **close):
    """The calls give the same outputs and gradients, with the same random numbers."""
    found = []
    for one, function in ((model, call), (other, layer_by_layer)):
        given = inputs()
        torch.manual_seed(2)
        with tasks(IDS):
            outputs = function(one, given[0], scale=given[1])
        found.append((outputs, gradients(one, given, outputs)))
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11, **close)
    assert all(value.abs().sum() > 0 for value in found[0][1])


@every_pair(dropout=[0.0, 0.4], checkpointed=[False, True])
def test_same_outputs_and_gradients_as_layer_by_layer(dropout, checkpointed):
    """With dropout too: the adapters' masks belong to places in task order either way."""
    model = network(dropout, checkpointed=checkpointed)
    assert_same(model, network(dropout))
    assert current_tasks() is None


class Permutations(TorchDispatchMode):
    """Counts the permutations of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))

    def __int__(self) -> int:
        refused = (torch.ops.aten.index, torch.ops.aten.index_add, torch.ops.aten.index_copy)
        assert not any(self.found[operator] for operator in refused)
        return self.found[torch.ops.aten.index_select]


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize(
    ("call", "ids", "forward", "backward"),
    [
        (call_sorted, IDS, lambda depth: 2 + 3, lambda depth: 2 + 2),
        (layer_by_layer, IDS, lambda depth: 2 * depth, lambda depth: 2 * depth),
        (call_sorted, IDS.sort().values, lambda depth: 0, lambda depth: 0),
    ],
    ids=["once", "in each layer", "sorted"],
)
def test_number_of_permutations(call, ids, forward, backward, depth):
    """Of two inputs and three outputs, of which two get gradients, whatever the depth."""
    model, given = network(depth=depth), inputs()
    with Permutations() as permutations, tasks(ids):
        outputs = call(model, given[0], scale=given[1])
    assert int(permutations) == forward(depth)
    with Permutations() as permutations:
        gradients(model, given, outputs)
    assert int(permutations) == backward(depth)


@pytest.mark.parametrize("model", [bert, roberta])
def test_models_of_transformers(model):
    """With padded sequences, labels, and outputs of all kinds."""
    model = model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    names = ["query", "value", "dense"]
    adapt(model, LoRAConfig(2, dropout=0.2, target_modules=names, heads=["classifier"]), 3)
    tokens = torch.randint(3, 99, (7, 6))
    given = {
        "input_ids": tokens,
        "attention_mask": (torch.arange(6) < torch.tensor([6, 3, 5, 1, 6, 2, 4])[:, None]).long(),
        "labels": torch.arange(7) % 2,
        "output_hidden_states": True,
    }
    found = []
    for call in (call_sorted, layer_by_layer):
        torch.manual_seed(0)
        with tasks(IDS):
            outputs = call(model, **given)
        leaves = [p for p in model.parameters() if p.requires_grad]
        total = outputs.loss + outputs.logits.square().sum()
        found.append((dict(outputs), torch.autograd.grad(total, leaves, allow_unused=True)))
        assert type(outputs).__name__ == "SequenceClassifierOutput"
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@needs_native
def test_compiled_models_and_calls():
    torch._dynamo.reset()
    model = network()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    assert_same(compiled, model)

    def call(model, *args, **kwargs):
        return torch.compile(call_sorted, backend="aot_eager")(model, *args, **kwargs)

    assert_same(model, model, call)


def test_inference_mode_before_training():
    model, given = network(), inputs()
    with tasks(IDS):
        with torch.inference_mode():
            before = call_sorted(model, *given)["logits"]
        outputs = call_sorted(model, *given)
    torch.testing.assert_close(outputs["logits"], before)
    gradients(model, given, outputs)


def test_optimiser_steps_the_tasks_present():
    model, given = network(), inputs()
    optimizer = TaskOptimizer(model, torch.optim.SGD, lr=0.1)
    before = model.head.weight.detach().clone()
    with tasks(torch.tensor([2, 0, 2, 0, 0, 2, 2])):
        call_sorted(model, *given)["logits"].square().sum().backward()
    optimizer.step()
    assert (model.head.weight != before).flatten(1).any(1).tolist() == [True, False, True]


def test_another_thread_and_inner_contexts():
    model, given = network(), inputs()
    with tasks(IDS) as batch:
        want = model(*given)["logits"]
        call = keep_tasks(call_sorted)
        assert call_sorted(lambda: current_tasks().order) is None
        assert current_tasks() is batch
    with tasks(IDS.flip(0)):
        torch.testing.assert_close(call(model, *given)["logits"], want)


def test_one_sample_and_packed_ones_are_passed_on_as_they_are():
    values = [object(), torch.zeros(3), [1]]
    for batch in (TaskBatch(torch.tensor([1])), TaskBatch(torch.tensor([0, 1]), lengths=[3, 2])):
        with tasks(batch):
            assert call_sorted(lambda *args: args, *values) == tuple(values)
    with tasks(torch.tensor([], dtype=torch.int64)):
        assert call_sorted(lambda: "none") == "none"


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("arguments", "outputs", "error", "message"),
    [
        ({"x": X.T}, X, ValueError, "'x' must have its samples first, [B=2, ...], got [3, 2]"),
        ({"x": {"ids": X, "places": X[:1]}}, X, ValueError, "[B=2, ...], got [1, 3]"),
        ({"x": X}, X.repeat(2, 1), ValueError, "the output must have its samples first"),
        ({"x": X}, {"a": (X, X.T)}, ValueError, "the output must have its samples first"),
        ({"x": SimpleNamespace(ids=X)}, X, TypeError, "'x' must be made of tensors"),
        ({"x": X.numpy()}, X, TypeError, "got a ndarray, whose samples cannot be told"),
        ({"x": ["one", "two"]}, X, TypeError, "got a list of 2 elements"),
        ({"x": (X, X)}, X, TypeError, "got a tuple of 2 elements"),
        ({"x": X}, [X, X], TypeError, "the output must be made of tensors [B=2, ...], got a list"),
        ({"x": X}, SimpleNamespace(logits=X), TypeError, "got a SimpleNamespace"),
    ],
)
def test_what_cannot_be_sorted_is_refused_in_any_order(arguments, outputs, error, message):
    for ids in ([1, 0], [0, 1]):
        with tasks(torch.tensor(ids)), pytest.raises(error, match=re.escape(message)):
            call_sorted(lambda x: outputs, **arguments)


@dataclass(frozen=True)
class Outputs:
    x: torch.Tensor
    loss: torch.Tensor
    name: str = "logits"


def test_dataclasses_are_taken_apart():
    given = torch.arange(4.0)[:, None]
    seen = []
    with tasks(torch.tensor([1, 0, 1, 0])):
        found = call_sorted(lambda o: seen.append(o) or o, Outputs(given, given.sum()))
    assert seen[0].x.flatten().tolist() == [1, 3, 0, 2]
    assert torch.equal(found.x, given)
    assert (float(found.loss), found.name) == (6.0, "logits")


def test_a_decoder_is_told_to_leave_out_its_cache():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 20, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2)
    model = adapt(transformers.LlamaForCausalLM(config), LoRAConfig(2), 2)
    tokens = torch.arange(8).reshape(4, 2)
    for ids in ([1, 0, 1, 0], [0, 0, 1, 1]):
        with tasks(torch.tensor(ids)):
            with pytest.raises(TypeError, match=r"DynamicCache, .* pass use_cache=False"):
                call_sorted(model, input_ids=tokens)
            found = call_sorted(model, input_ids=tokens, use_cache=False).logits
            torch.testing.assert_close(found, model(input_ids=tokens).logits)


def test_what_holds_no_samples_is_passed_on():
    given = {"a": 0.5, "b": None, "c": "mean", "d": torch.tensor(3.0), "e": (1, 2, 3), "f": []}
    given |= {"g": torch.float16, "h": torch.device("cpu"), "i": b"", "j": torch.strided}
    with tasks(torch.tensor([1, 0])):
        found = metalora.call_sorted(lambda **kwargs: kwargs, **given, x=X)
    assert {name: found[name] for name in given} == given


def test_needs_the_tasks():
    with pytest.raises(ValueError, match=r"Call it inside `with metalora\.tasks"):
        call_sorted(network(), inputs()[0])
