"""Putting adapters into models and taking them out."""

import copy
import re

import pytest
import torch
from torch import nn

from metalora.adapters import (
    LoRAConfig,
    adapt,
    adapted_layers,
    base_state_dict,
    freeze_base,
    load_base_state_dict,
    load_task_state_dict,
    merge_and_unload,
    reset_adapters,
    task_state_dict,
    unload,
)
from metalora.nn import MultiTaskHead, MultiTaskLoRALinear, SymmetricLoRALinear, tasks


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x + torch.tanh(self.query(x)) * self.value(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def model(seed=0):
    torch.manual_seed(seed)
    return Model()


def randomise(adapted):
    """Gives every task its own, non-zero adapters and heads."""
    for layer in adapted_layers(adapted).values():
        for parameter in layer.own_task_parameters().values():
            nn.init.normal_(parameter, std=0.3)
    return adapted


def names(config):
    return list(adapted_layers(adapt(model(), config, 2)))


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (
            "all-linear",
            ["embed", "blocks.0.query", "blocks.0.value", "blocks.1.query", "blocks.1.value"],
        ),
        (["query"], ["blocks.0.query", "blocks.1.query"]),
        (["0.query", "embed"], ["embed", "blocks.0.query"]),
        (["blocks.1.value"], ["blocks.1.value"]),
        (r"blocks\.\d\.value", ["blocks.0.value", "blocks.1.value"]),
        (r".*\.1\..*", ["blocks.1.query", "blocks.1.value"]),
        ([], []),
    ],
)
def test_targets_by_name_suffix_and_regular_expression(targets, found):
    assert names(LoRAConfig(rank=1, target_modules=targets, heads=["head"])) == [*found, "head"]


@pytest.mark.parametrize("excluded", [["value", "blocks.1.query"], r".*value|blocks\.1\.query"])
def test_exclusions(excluded):
    config = LoRAConfig(rank=1, exclude_modules=excluded, heads=["head"])
    assert names(config) == ["embed", "blocks.0.query", "head"]


def test_layers_are_of_the_kind_that_the_config_says():
    adapted = adapt(model(), LoRAConfig(rank=2, alpha=5, dropout=0.25, heads=["head"]), 4)
    layer = adapted.blocks[0].query
    assert type(layer) is MultiTaskLoRALinear
    assert (layer.rank, layer.scaling, layer.dropout, layer.num_tasks) == (2, 2.5, 0.25, 4)
    assert type(adapted.head) is MultiTaskHead
    adapted = adapt(model(), LoRAConfig(rank=2, target_modules=["value"], symmetric=True), 2)
    assert type(adapted.blocks[0].value) is SymmetricLoRALinear


def test_base_parameters_are_the_same_objects_under_the_same_names():
    plain = model()
    before = dict(plain.named_parameters())
    optimizer = torch.optim.SGD(plain.parameters(), lr=1.0)
    adapted = adapt(plain, LoRAConfig(rank=1, target_modules=["query", "embed"]), 2)
    assert adapted is plain
    after = dict(adapted.named_parameters())
    for name, parameter in before.items():
        assert after[name] is parameter
    with tasks(torch.tensor([0, 1])):
        adapted(torch.randn(2, 3, 4)).sum().backward()
    weight = before["embed.weight"].detach().clone()
    optimizer.step()
    assert not torch.equal(adapted.embed.weight, weight)


def test_adapting_changes_nothing_at_first():
    plain, x = model(), torch.randn(5, 3, 4)
    want = plain(x)
    adapt(plain, LoRAConfig(rank=2, heads=["head"]), 3)
    with tasks(torch.tensor([2, 0, 0, 1, 2])):
        torch.testing.assert_close(plain(x), want)


def test_tasks_do_not_touch_each_other():
    adapted, x = (
        randomise(adapt(model(), LoRAConfig(rank=2, heads=["head"]), 3)),
        torch.randn(2, 3, 4),
    )
    with tasks(torch.tensor([0, 2])):
        adapted(x).sum().backward()
    for name, layer in adapted_layers(adapted).items():
        for parameter in layer.own_task_parameters().values():
            touched = [bool(g.abs().sum() > 0) for g in parameter.grad]
            assert touched == [True, False, True], name


def test_dtype_device_and_mode_follow_the_layer():
    plain = model().double().eval()
    adapted = adapt(plain, LoRAConfig(rank=1, heads=["head"]), 2)
    assert {p.dtype for p in adapted.parameters()} == {torch.float64}
    assert not any(m.training for m in adapted.modules())
    assert not any(m.training for m in unload(adapted).modules())


def test_deepcopy_and_pickle_free_state_dict_round_trip():
    adapted = randomise(adapt(model(), LoRAConfig(rank=2, heads=["head"]), 2))
    other = adapt(model(1), LoRAConfig(rank=2, heads=["head"]), 2)
    other.load_state_dict(adapted.state_dict())
    x = torch.randn(2, 3, 4)
    with tasks(torch.tensor([1, 0])):
        assert torch.equal(other(x), adapted(x))
        assert torch.equal(copy.deepcopy(adapted)(x), adapted(x))


def test_base_state_dict_loads_strictly_into_the_plain_model():
    adapted = randomise(adapt(model(), LoRAConfig(rank=2, heads=["head"]), 3))
    state = base_state_dict(adapted)
    plain = model(1)
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.blocks[0].query.weight, adapted.blocks[0].query.weight)
    torch.testing.assert_close(plain.head.weight, adapted.head.weight.mean(0))
    torch.testing.assert_close(plain.head.bias, adapted.head.bias.mean(0))


def test_load_base_state_dict_gives_a_head_to_all_tasks():
    config = LoRAConfig(rank=2, heads=["head"])
    source, target = (randomise(adapt(model(seed), config, 3)) for seed in (1, 2))
    kept = task_state_dict(target, 1)
    load_base_state_dict(target, base_state_dict(source))
    torch.testing.assert_close(base_state_dict(target), base_state_dict(source), rtol=0, atol=0)
    mean = base_state_dict(source)["head.weight"]
    assert torch.equal(target.head.weight, mean.expand(3, -1, -1))
    now = task_state_dict(target, 1)
    assert all(torch.equal(now[name], kept[name]) for name in kept if "lora" in name)
    load_base_state_dict(target, model().state_dict())  # the plain model's own
    assert torch.equal(target.embed.weight, model().embed.weight)


def test_base_state_that_does_not_fit_changes_nothing():
    adapted = adapt(model(), LoRAConfig(rank=2, heads=["head"]), 3)
    before, good = copy.deepcopy(adapted.state_dict()), model(5).state_dict()
    bad = [
        (good | {"haed.weight": good["head.weight"]}, "the plain model has no 'haed.weight'; did"),
        ({n: p for n, p in good.items() if n != "head.bias"}, "'head.bias' is missing from state"),
        (good | {"head.bias": torch.zeros(4)}, "'head.bias' must be [3], got [4]"),
        (adapted.state_dict(), "the plain model has no 'embed.lora_A'"),
    ]
    for state, message in bad:
        with pytest.raises(ValueError, match=re.escape(f"load_base_state_dict: {message}")):
            load_base_state_dict(adapted, state)
        assert all(torch.equal(p, before[n]) for n, p in adapted.state_dict().items())
    with pytest.raises(ValueError, match="load_base_state_dict: the model has no adapters"):
        load_base_state_dict(model(), good)


def test_task_state_dict_moves_a_task():
    adapted = randomise(adapt(model(), LoRAConfig(rank=2, heads=["head"]), 3))
    state = task_state_dict(adapted, 1)
    assert state["blocks.0.query.lora_A"].shape == (2, 6)
    assert state["blocks.0.query.lora_B"].shape == (6, 2)
    assert state["head.weight"].shape == (3, 6)
    load_task_state_dict(adapted, 2, state)
    x = torch.randn(1, 3, 4)
    with tasks(torch.tensor([1])):
        as_one = adapted(x)
    with tasks(torch.tensor([2])):
        torch.testing.assert_close(adapted(x), as_one)
    before = task_state_dict(adapted, 0)
    nn.init.zeros_(adapted.head.weight)
    assert before["head.weight"].abs().sum() > 0, "must be a copy"


def test_task_state_that_does_not_fit_changes_nothing():
    adapted = randomise(adapt(model(), LoRAConfig(rank=2, heads=["head"]), 2))
    state, before = task_state_dict(adapted, 1), adapted.state_dict()
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(ValueError, match=r"no 'head\.wieght'; did you mean 'head\.weight'"):
        load_task_state_dict(adapted, 0, {**state, "head.wieght": state["head.weight"]})
    with pytest.raises(ValueError, match=r"'head\.bias' must be \[3\], got \[4\]"):
        load_task_state_dict(adapted, 0, {**state, "head.bias": torch.zeros(4)})
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"'head\.bias' is missing"):
        load_task_state_dict(adapted, 0, state)
    assert all(torch.equal(v, before[k]) for k, v in adapted.state_dict().items())


def test_remove_leaves_the_plain_model_and_its_own_parameters():
    plain = model()
    before, layout = dict(plain.named_parameters()), str(plain)
    adapted = randomise(adapt(plain, LoRAConfig(rank=2, heads=["head"]), 3))
    heads = adapted.head.weight.detach().clone()
    unload(adapted)
    assert str(plain) == layout
    after = dict(plain.named_parameters())
    assert all(after[name] is before[name] for name in before if not name.startswith("head"))
    torch.testing.assert_close(plain.head.weight, heads.mean(0))
    assert plain.head.weight.requires_grad


@pytest.mark.parametrize("task", [0, 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_remove_with_a_task_merges_it(task, symmetric):
    plain = model().double()
    weight = plain.blocks[0].query.weight
    unmerged = weight.detach().clone()
    config = LoRAConfig(
        rank=2,
        alpha=3,
        target_modules=["query"],
        heads=["head"],
        symmetric=symmetric,
    )
    adapted, x = randomise(adapt(plain, config, 3)), torch.randn(4, 3, 4, dtype=torch.float64)
    with tasks(torch.full((4,), task)):
        want = adapted(x)
    merge_and_unload(adapted, task)
    assert not adapted_layers(adapted)
    torch.testing.assert_close(adapted(x), want, rtol=0, atol=1e-12)
    assert torch.equal(weight, unmerged), "the shared weight must not change under other users"


def test_freezing_leaves_adapters_and_heads():
    adapted = adapt(model(), LoRAConfig(rank=1, target_modules=["query"], heads=["head"]), 2)
    adapted.embed.bias.requires_grad_(False)
    freeze_base(adapted)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == {
        f"blocks.{i}.query.lora_{ab}" for i in (0, 1) for ab in "AB"
    } | {"head.weight", "head.bias"}


@pytest.mark.parametrize("task", [None, 1])
def test_taking_adapters_out_ends_the_freezing(task):
    plain = model()
    plain.embed.bias.requires_grad_(False)
    before = {name: p.requires_grad for name, p in plain.named_parameters()}
    adapt(plain, LoRAConfig(rank=1, target_modules=["query"], heads=["head"]), 2)
    freeze_base(plain)
    freeze_base(plain)
    copied = copy.deepcopy(plain)
    with pytest.raises(ValueError, match="task must be in 0"):
        merge_and_unload(plain, 2)
    assert not plain.blocks[0].value.weight.requires_grad  # as it was
    for frozen in (plain, copied):
        unload(frozen) if task is None else merge_and_unload(frozen, task)
        assert {name: p.requires_grad for name, p in frozen.named_parameters()} == before
        assert not any("frozen" in name for module in frozen.modules() for name in vars(module))


def test_reset_draws_adapters_and_heads_afresh():
    adapted = randomise(adapt(model(), LoRAConfig(rank=1, heads=["head"]), 2))
    before = {k: v.clone() for k, v in adapted.state_dict().items()}
    torch.manual_seed(5)
    reset_adapters(adapted)
    for name, value in adapted.state_dict().items():
        own = "lora" in name or name.startswith("head")
        assert torch.equal(value, before[name]) != own, name
    assert (adapted.embed.lora_B == 0).all()


def test_one_module_in_two_places_stays_one():
    shared = nn.Linear(4, 4)
    both = nn.Sequential(shared, nn.Tanh(), shared)
    adapt(both, LoRAConfig(rank=1), 2)
    assert both[0] is both[2]
    state = base_state_dict(both)
    assert set(state) == {f"{i}.{n}" for i in (0, 2) for n in ("weight", "bias")}
    unload(both)
    assert both[0] is both[2]
    with pytest.raises(ValueError, match="'2' and '0' are one and the same module"):
        adapt(both, LoRAConfig(rank=1, target_modules=["2"]), 2)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.output.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.output

    def forward(self, ids):
        return self.output(self.embedding(ids))


def test_tied_weights_stay_tied_until_merged():
    tied = adapt(Tied(), LoRAConfig(rank=1, target_modules=["output"]), 2)
    assert tied.output.weight is tied.embedding.weight
    unload(tied)
    assert tied.output.weight is tied.embedding.weight
    randomise(adapt(tied, LoRAConfig(rank=1, target_modules=["output"]), 2))
    embedding = tied.embedding.weight.detach().clone()
    merge_and_unload(tied, 1)
    assert tied.output.weight is not tied.embedding.weight
    assert torch.equal(tied.embedding.weight, embedding)


def test_tied_heads_are_refused():
    with pytest.raises(ValueError, match="'output' shares its weight with 'embedding'"):
        adapt(Tied(), LoRAConfig(target_modules=(), heads=["output"]), 2)


def test_all_linear_leaves_out_the_output_embedding():
    outer = nn.ModuleDict({"lm": Tied(), "other": nn.Linear(4, 4)})
    outer.get_output_embeddings = lambda: outer["lm"].output
    assert list(adapted_layers(adapt(outer, LoRAConfig(rank=1), 2))) == ["other"]


class Classifier(nn.Module):
    def __init__(self, norm=False) -> None:
        super().__init__()
        self.dense, self.dropout, self.out_proj = nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 2)
        if norm:
            self.norm = nn.LayerNorm(4)


def test_a_head_may_be_a_module_of_linear_layers():
    whole = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": Classifier()})
    adapt(whole, LoRAConfig(rank=1, heads=["classifier"]), 2)
    assert type(whole["body"]) is MultiTaskLoRALinear
    assert type(whole["classifier"].dense) is type(whole["classifier"].out_proj) is MultiTaskHead


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Classifier(norm=True), "its parameters ['norm.weight', 'norm.bias'] are in none"),
        (nn.Dropout(), "is a Dropout; a head is made of nn.Linear layers, but there is none in it"),
    ],
)
def test_heads_that_cannot_be_are_refused(head, message):
    whole = nn.ModuleDict({"body": nn.Linear(4, 4), "classifier": head})
    with pytest.raises(ValueError, match=re.escape(message)):
        adapt(whole, LoRAConfig(rank=1, heads=["classifier"]), 2)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(4, 4)}) for _ in range(2))
        self.fc = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"heads": ["fc"]}, ["fc"]),
        ({"heads": ["0.fc"]}, ["blocks.0.fc"]),
        ({"heads": ["blocks"]}, ["blocks.0.fc", "blocks.1.fc"]),
        ({"heads": ["blocks"], "exclude_modules": ["1.fc"]}, ["blocks.0.fc"]),
        ({"heads": ["fc"], "exclude_modules": "blocks.*"}, ["fc"]),
    ],
)
def test_a_whole_name_is_one_head_and_exclusions_hold_for_heads(settings, heads):
    layers = adapted_layers(adapt(Nested(), LoRAConfig(rank=1, **settings), 2))
    assert [name for name, layer in layers.items() if type(layer) is MultiTaskHead] == heads


def test_heads_are_known_by_their_place_in_nested_containers():
    inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    outer = nn.Sequential(inner, nn.Linear(4, 2))
    layers = adapted_layers(adapt(outer, LoRAConfig(rank=1, heads=["1"]), 2))
    assert [name for name, layer in layers.items() if type(layer) is MultiTaskHead] == ["1"]


def test_a_head_that_is_excluded_is_refused():
    with pytest.raises(ValueError, match="heads: exclude_modules leaves nothing of 'fc'"):
        adapt(Nested(), LoRAConfig(rank=1, heads=["fc"], exclude_modules=["fc"]), 2)


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_hook():
    layer = nn.Linear(4, 4)
    layer.register_forward_pre_hook(lambda module, args: None)
    return layer


def with_forward():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return layer


STRANGE = [
    (lambda: OwnLinear(4, 4), "it is a OwnLinear, not an nn.Linear"),
    (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
        "it is a ParametrizedLinear, not an nn.Linear",
    ),
    (lambda: nn.LazyLinear(4), "it is a LazyLinear, not an nn.Linear"),
    (with_hook, "it has hooks"),
    (with_forward, "its forward was replaced"),
]


@pytest.mark.parametrize(("make", "why"), STRANGE)
def test_layers_that_are_no_plain_linear_are_refused_or_left_out_aloud(make, why):
    strange = nn.ModuleDict({"odd": make(), "plain": nn.Linear(4, 4)})
    with pytest.raises(ValueError, match=re.escape(f"'odd' cannot get an adapter: {why}")):
        adapt(strange, LoRAConfig(rank=1, target_modules=["odd"]), 2)
    with pytest.warns(UserWarning, match=re.escape(f"all-linear leaves out 'odd' ({why}")):
        adapt(strange, LoRAConfig(rank=1), 2)
    assert list(adapted_layers(strange)) == ["plain"]


def test_other_modules_cannot_be_targets():
    with pytest.raises(ValueError, match=r"'blocks\.0\.norm' cannot .* LayerNorm, not an nn"):
        adapt(model(), LoRAConfig(target_modules=["norm"]), 2)


def test_symmetric_adapters_want_square_layers():
    with pytest.raises(ValueError, match=r"'embed' cannot .*square layer, got \[out=6, in=4\]"):
        adapt(model(), LoRAConfig(rank=1, target_modules=["embed"], symmetric=True), 2)
    with pytest.warns(UserWarning, match=r"leaves out 'embed' \(a symmetric adapter"):
        adapted = adapt(model(), LoRAConfig(rank=1, symmetric=True, heads=["head"]), 2)
    assert type(adapted.blocks[0].query) is SymmetricLoRALinear


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(target_modules=["qeury"]), "target_modules: no module of the model matches"),
        (LoRAConfig(target_modules=["qeury"]), "did you mean 'query'"),
        (LoRAConfig(target_modules=["query", "valu"]), "matches 'valu'; did you mean 'value'"),
        (LoRAConfig(target_modules="blocks.0.qery"), "did you mean 'blocks.0.query'"),
        (
            LoRAConfig(target_modules="query"),
            "target_modules: no module of the model matches 'query': a string is a regular "
            "expression for the whole module name; for names give a list, as in ['query']",
        ),
        (LoRAConfig(target_modules="qeury"), "(a string is a regular expression for the whole mod"),
        (LoRAConfig(exclude_modules="value"), "exclude_modules: no module of the model matches"),
        (LoRAConfig(exclude_modules=["valeu"]), "exclude_modules: no module of the model matches"),
        (LoRAConfig(exclude_modules=["valeu"]), "matches 'valeu'; did you mean 'value'"),
        (LoRAConfig(exclude_modules=["value", "qery"]), "matches 'qery'; did you mean 'query'"),
        (
            LoRAConfig(target_modules="["),
            "target_modules: '[' is no valid regular expression (unterminated character set",
        ),
        (LoRAConfig(target_modules="*"), "adapt: target_modules: '*' is no valid regular"),
        (LoRAConfig(exclude_modules="*"), "adapt: exclude_modules: '*' is no valid regular"),
        (LoRAConfig(target_modules="head", heads=["head"], exclude_modules=["x"]), "matches 'x'"),
        (LoRAConfig(target_modules="embed", exclude_modules=["embed"]), "nothing to adapt"),
        (LoRAConfig(heads=["haed"]), "heads: no module of the model matches 'haed'; did you mean"),
        (
            LoRAConfig(heads=["bloks"]),
            "no module of the model matches 'bloks'; did you mean 'bl",
        ),
        (LoRAConfig(heads=["last"]), "matches 'last'; there are 'head', 'blocks.1.value', "),
        (LoRAConfig(target_modules=["uery"]), "no module of the model matches 'uery'"),
        (LoRAConfig(target_modules=()), "nothing to adapt"),
        (LoRAConfig(target_modules=["query"], exclude_modules=["query"]), "nothing to adapt"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(config, message):
    plain = model()
    layout = str(plain)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        adapt(plain, config, 2)
    assert "\n" not in str(refused.value)
    assert str(plain) == layout


def test_adapting_twice_is_refused():
    adapted = adapt(model(), LoRAConfig(rank=1, target_modules=["query"]), 2)
    for targets in (["query"], "all-linear"):
        with pytest.raises(ValueError, match=r"it has one already; metalora\.unload"):
            adapt(adapted, LoRAConfig(rank=1, target_modules=targets), 2)
    with pytest.raises(ValueError, match=r"num_tasks must be 2, .* got 3"):
        adapt(adapted, LoRAConfig(rank=1, target_modules=["value"]), 3)
    adapt(adapted, LoRAConfig(rank=1, target_modules=["value"]), 2)
    assert len(adapted_layers(adapted)) == 4
    for heads in (["0.query"], ["blocks"]):
        with pytest.raises(ValueError, match=r"heads: .*query' cannot be a head: it has one alr"):
            adapt(adapted, LoRAConfig(rank=1, target_modules=(), heads=heads), 2)


@pytest.mark.parametrize("task_count", [0, -1])
def test_bad_number_of_tasks(task_count):
    with pytest.raises(ValueError, match="adapt: num_tasks must be an int >= 1"):
        adapt(model(), LoRAConfig(), task_count)


def test_wrong_arguments_are_explained():
    with pytest.raises(TypeError, match=r"lora_config must be a metalora\.LoRAConfig or a peft"):
        adapt(model(), {"rank": 2}, 2)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got list"):
        adapt([], LoRAConfig(), 2)
    with pytest.raises(ValueError, match="the model itself is the layer"):
        adapt(nn.Linear(3, 3), LoRAConfig(rank=1), 2)
    for function in (unload, freeze_base, reset_adapters):
        with pytest.raises(ValueError, match=f"{function.__name__}: the model has no adapters"):
            function(model())
    adapted = adapt(model(), LoRAConfig(rank=1), 2)
    with pytest.raises(ValueError, match=r"task must be in 0\.\.1, got 2"):
        merge_and_unload(adapted, 2)
    with pytest.raises(ValueError, match=r"task must be in 0\.\.1, got -1"):
        task_state_dict(adapted, -1)


def test_rank_above_a_layer_is_noted_by_name():
    with pytest.warns(UserWarning, match=r"MultiTaskLoRALinear 'head': rank 4 is above") as noted:
        adapt(model(), LoRAConfig(rank=4, target_modules=["head"]), 2)
    assert [warning.filename for warning in noted] == [__file__]
    odd = nn.Sequential(OwnLinear(4, 4), nn.Linear(4, 4))
    with pytest.warns(UserWarning, match="all-linear leaves out") as noted:
        adapt(odd, LoRAConfig(rank=1), 2)
    assert [warning.filename for warning in noted] == [__file__]


def test_errors_in_forward_name_the_layer():
    adapted = adapt(model(), LoRAConfig(rank=1, target_modules=["value"]), 2)
    with pytest.raises(ValueError, match=r"'blocks\.0\.value': which task does each sample"):
        adapted(torch.randn(2, 3, 4))
    with (
        pytest.raises(ValueError, match=r"'blocks\.0\.value': x must have its samples first"),
        tasks(torch.tensor([0, 1, 1])),
    ):
        adapted(torch.randn(2, 3, 4))


def test_a_model_that_is_a_layer_of_tasks_has_its_names_and_must_be_put_into_a_container():
    layer = MultiTaskLoRALinear(3, 4, 2, 1)
    assert set(base_state_dict(layer)) == {"weight", "bias"}
    head = MultiTaskHead(3, 4, 2)
    torch.testing.assert_close(base_state_dict(head)["weight"], head.weight.mean(0))
    state = task_state_dict(layer, 0)
    assert {name: list(t.shape) for name, t in state.items()} == {
        "lora_A": [1, 3], "lora_B": [4, 1],
    }  # fmt: skip
    load_task_state_dict(layer, 1, state)
    assert torch.equal(layer.lora_A[1], layer.lora_A[0])
    message = "the layer itself, a MultiTaskLoRALinear; put it into a container"
    with pytest.raises(ValueError, match=f"^unload: .*{message}"):
        unload(layer)
    with pytest.raises(ValueError, match=f"^merge_and_unload: .*{message}"):
        merge_and_unload(layer, 1)
    assert not list(layer.children())
    assert type(unload(nn.Sequential(layer))[0]) is nn.Linear


@pytest.mark.parametrize("frozen", [{"weight"}, {"bias"}, {"weight", "bias"}])
@pytest.mark.parametrize("remove", [unload, lambda adapted: merge_and_unload(adapted, 1)])
def test_what_was_frozen_is_frozen_again(remove, frozen):
    plain = nn.ModuleDict({
        "tokens": nn.Embedding(5, 4), "body": nn.Linear(4, 4), "out": nn.Linear(4, 2),
    })  # fmt: skip
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] not in frozen)
    before = {name: p.requires_grad for name, p in plain.named_parameters()}
    adapt(plain, LoRAConfig(rank=1, target_modules=["body"], heads=["tokens", "out"]), 2)
    assert all(p.requires_grad for layer in (plain["tokens"], plain["out"])
               for p in layer.parameters())  # fmt: skip
    remove(copy.deepcopy(plain))
    remove(plain)
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == before
    adapt(plain, LoRAConfig(rank=1, target_modules=["body"], heads=["out"]), 2)
    plain["out"].requires_grad_(False)
    assert not any(p.requires_grad for p in remove(plain)["out"].parameters())
