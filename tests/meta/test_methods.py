"""The ways to train: what each leaves behind, and that every switch does something."""

import math
import re
import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metalora.adapters import LoRAConfig, adapted_layers, merge_and_unload
from metalora.meta import (
    Batch,
    Callback,
    DivergedError,
    KeepBest,
    RoundLoader,
    TrainConfig,
    cross_entropy,
    evaluate,
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    mean_token_loss,
    reptile,
    squared_error,
    standard,
)
from metalora.nn import MultiTaskHead
from tests.meta.given import GivenRounds

T = 3
LORA = LoRAConfig(rank=2)


def data(count=90, seed=0):
    """Three tasks whose labels follow different directions of the input."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    directions = torch.randn(T, 8, generator=torch.Generator().manual_seed(9))
    ids = torch.arange(count) % T
    return inputs, ((inputs * directions[ids]).sum(1) > 0).long(), ids


def rounds(**options):
    return RoundLoader(*data(), **{"batch_size": 10, "seed": 1, **options})


def validation():
    return RoundLoader(*data(60, seed=1), batch_size=20, shuffle=False)


def network(dropout=0.1):
    torch.manual_seed(0)
    return Network(dropout)


class Network(nn.Module):
    def __init__(self, dropout) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x))


METHODS = {
    "standard": standard,
    "lora-ml": lambda *args, **options: lora_ml(*args, LORA, **options),
    "last-layer-ml": partial(last_layer_ml, heads=["head"]),
    "reptile": lambda *args, **options: reptile(*args, inner_steps=2, **options),
    "finetune-lora": lambda *args, **options: finetune_lora(*args, LORA, **options),
    "finetune-last-layer": partial(finetune_last_layer, heads=["head"]),
}


def weights_after(method, source=None, model=None, **fields):
    model = network() if model is None else model
    config = TrainConfig(**{"epochs": 2, "lr": 0.01, **fields})
    METHODS[method](model, rounds() if source is None else source, config)
    return flat(model)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", METHODS)
def test_training_learns(method):
    config = TrainConfig(epochs=15, lr=0.02)
    result = METHODS[method](network(), rounds(), config, validation=validation())
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    assert [record["epoch"] for record in result.history] == list(range(15))


@pytest.mark.parametrize("method", ["standard", "lora-ml", "last-layer-ml", "reptile"])
def test_retraining_leaves_a_plain_model_with_its_own_parameters(method):
    model = network()
    layout, before = str(model), dict(model.named_parameters())
    start = {k: v.detach().clone() for k, v in before.items()}
    METHODS[method](model, rounds(), TrainConfig(epochs=1, lr=0.01))
    assert str(model) == layout
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert not torch.equal(parameter, start[name])
        assert parameter is before[name] or method == "last-layer-ml"


@pytest.mark.parametrize("method", ["finetune-lora", "finetune-last-layer"])
def test_fine_tuning_changes_adapters_only_and_leaves_them_in(method):
    model = network()
    start = {k: v.clone() for k, v in model.state_dict().items()}
    result = METHODS[method](model, rounds(), TrainConfig(epochs=1, lr=0.01))
    layers = adapted_layers(model)
    assert list(layers) == (["head"] if method == "finetune-last-layer" else ["body.0", "head"])
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    own = {id(p) for layer in layers.values() for p in layer.own_task_parameters().values()}
    assert trainable == own
    for name, value in model.state_dict().items():
        if name in start and value.shape == start[name].shape:
            assert torch.equal(value, start[name]), name
    assert len(result.adapters) == T
    for name, value in result.adapters[1].items():
        assert torch.equal(model.state_dict()[name][1], value)


def test_adapters_of_retraining_are_returned():
    result = lora_ml(network(), rounds(), TrainConfig(epochs=1, lr=0.01), LORA)
    assert len(result.adapters) == T
    assert set(result.adapters[0]) == {
        f"{layer}.lora_{ab}" for layer in ("body.0", "head") for ab in "AB"
    }
    assert result.adapters[0]["head.lora_B"].abs().sum() > 0
    assert standard(network(), rounds(), TrainConfig(epochs=1, lr=0.01)).adapters == []


def test_last_layer_ml_keeps_the_mean_head():
    model = network()
    result = last_layer_ml(model, rounds(), TrainConfig(epochs=1, lr=0.01), ["head"])
    heads = torch.stack([adapter["head.weight"] for adapter in result.adapters])
    assert not torch.equal(heads[0], heads[1])
    torch.testing.assert_close(model.head.weight, heads.mean(0))


def test_fresh_heads_start_anew_and_others_from_the_model():
    config = TrainConfig(epochs=1, lr=1e-9)
    model, start = network(), network().head.weight
    finetune_last_layer(model, rounds(), config, ["head"], fresh=False)
    assert isinstance(model.head, MultiTaskHead)
    torch.testing.assert_close(model.head.weight, start.expand(T, -1, -1))
    model = network()
    finetune_last_layer(model, rounds(), config, ["head"], fresh=True)
    assert not torch.allclose(model.head.weight[0], start, atol=1e-3)


def test_removing_a_task_after_fine_tuning_merges_it():
    model, source = network(), validation()
    finetune_lora(model, rounds(), TrainConfig(epochs=3, lr=0.02), LORA)
    adapted = evaluate(model, source)
    merge_and_unload(model, 1)
    assert evaluate(model, source).per_task[1] == adapted.per_task[1]


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_repeats_bit_for_bit_whatever_came_before(method):
    torch.manual_seed(1)
    first = weights_after(method, seed=3)
    torch.manual_seed(2)
    assert torch.equal(weights_after(method, seed=3), first)
    assert not torch.equal(weights_after(method, seed=4), first)


SWITCHES = [
    {"lr": 0.02},
    {"epochs": 3},
    {"weight_decay": 0.5},
    {"optimizer": "adamw", "weight_decay": 0.5},
    {"optimizer": "sgd"},
    {"schedule": "cosine"},
    {"schedule": "linear"},
    {"schedule": "linear", "schedule_unit": "step"},
    {"schedule": "linear", "schedule_scale": 4.0},
    {"warmup": 0.5, "schedule_unit": "step"},
    {"grad_clip": 1e-9},  # of the order of Adam's eps: Adam itself does not heed the scale
    {"precision": "bf16"},
    {"precision": "fp16"},
    {"step_per": "task"},
]


@pytest.mark.parametrize("fields", SWITCHES, ids=str)
def test_every_setting_changes_the_outcome(fields):
    assert not torch.equal(weights_after("lora-ml", **fields), weights_after("lora-ml"))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_near(method, precision):
    config = {"optimizer": "sgd", "lr": 0.1}
    full = weights_after(method, model=network(dropout=0.0), **config)
    torch.testing.assert_close(
        weights_after(method, model=network(dropout=0.0), precision=precision, **config),
        full,
        rtol=0,
        atol=0.01,
    )


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {}),
        ("sgd", torch.optim.SGD, {"momentum": 0.9}),
        ("adam", torch.optim.Adam, {"betas": (0.5, 0.9)}),
        ("adamw", torch.optim.AdamW, {"eps": 0.1}),
    ],
)
@pytest.mark.parametrize("by", ["order", "weighting", "a loader's pooled"])
def test_standard_retraining_takes_the_mean_over_samples(name, kind, settings, by):
    """Against a plain loop, with tasks of unequal size."""
    inputs, targets, ids = data()
    ids[(ids == 0) & (torch.arange(len(ids)) % 2 > 0)] = -1
    order = "pooled" if by == "order" else "proportional"
    given = {"weighting": "samples"} if by == "weighting" else {}
    source = RoundLoader(inputs, targets, ids, batch_size=16, seed=1, order=order, **given)
    if by == "a loader's pooled":
        source = GivenRounds(list(source), T, pooled=True)
    model, plain = network(dropout=0.0), network(dropout=0.0)
    config = TrainConfig(epochs=1, lr=0.1, weight_decay=0.01, optimizer=name, **settings)
    standard(model, source, config)
    optimizer = kind(plain.parameters(), lr=0.1, weight_decay=0.01, **settings)
    for batch in source:
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(batch.inputs), batch.targets).backward()
        optimizer.step()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_batches_of_one_kind_are_refused_where_others_are_needed():
    model, source = network(), rounds(order="pooled")
    with pytest.raises(ValueError, match="pooled rounds ignore tasks; use step_per='round'"):
        standard(model, source, TrainConfig(epochs=1, lr=0.1, step_per="task"))
    with pytest.raises(ValueError, match="reptile: pooled rounds ignore tasks"):
        reptile(model, source, TrainConfig(epochs=1, lr=0.1))
    for order in ("interleaved", "blocked"):
        with pytest.raises(ValueError, match="got batches of single tasks; use a loader with"):
            reptile(model, rounds(order=order), TrainConfig(epochs=1, lr=0.1))


@pytest.mark.parametrize("order", ["interleaved", "blocked"])
def test_standard_retraining_task_by_task_is_a_step_on_each_batchs_mean(order):
    """Against a plain loop; 40, 30 and 20 samples."""
    inputs, labels, _ = data()
    ids = torch.tensor([0] * 40 + [1] * 30 + [2] * 20)
    model, plain = network(dropout=0.0), network(dropout=0.0)
    result = standard(
        model,
        RoundLoader(inputs, labels, ids, batch_size=16, seed=1, order=order),
        TrainConfig(epochs=1, lr=0.1, optimizer="sgd"),
    )
    optimizer, losses = torch.optim.SGD(plain.parameters(), lr=0.1), []
    for batch in RoundLoader(inputs, labels, ids, batch_size=16, seed=1, order=order):
        assert len(batch.tasks_present()) == 1
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(plain(batch.inputs), batch.targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert len(losses) == 3 + 2 + 2
    assert result.history[0]["loss"] == pytest.approx(sum(losses) / 7)
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want)


def test_blocks_leave_the_last_task_best_and_turns_do_not():
    """The order of tasks has the effect it is known for: the last block is remembered best."""

    def losses(order):
        inputs, labels, ids = data()
        labels = torch.where(ids == T - 1, 1 - labels, labels)  # the last task contradicts
        source = RoundLoader(inputs, labels, ids, batch_size=5, seed=1, order=order)
        model = network(dropout=0.0)
        standard(model, source, TrainConfig(epochs=3, lr=0.3, optimizer="sgd"))
        each = nn.functional.cross_entropy(model(inputs), labels, reduction="none")
        return [float(each[ids == task].mean().detach()) for task in range(T)]

    blocked, interleaved = losses("blocked"), losses("interleaved")
    assert blocked[T - 1] < 0.9 * interleaved[T - 1]
    assert min(blocked[:-1]) > blocked[T - 1]


class Watch(nn.Module):
    """Makes sure of what a model is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.sizes = nn.Linear(8, 16), nn.Linear(16, 2), []

    def forward(self, x):
        self.sizes.append(len(x))
        return self.head(self.inner(x))


@pytest.mark.parametrize(("step_per", "sizes"), [("round", [30] * 3), ("task", [10] * 9)])
def test_all_tasks_of_a_round_go_through_the_model_at_once(step_per, sizes):
    model = Watch()
    lora_ml(model, rounds(), TrainConfig(epochs=1, lr=0.01, step_per=step_per), LORA)
    assert model.sizes == sizes


def in_passes(batch):
    """Seven samples at a time, those of all tasks mixed."""
    for rows in torch.arange(len(batch.targets)).flip(0).split(7):
        yield replace(batch.take(rows), collate=None)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_passes_add_up_to_the_batch(method, precision):
    def weights(collate):
        source = rounds(collate=collate, order="pooled" if method == "standard" else "rounds")
        kind = torch.float64 if precision == "fp32" else torch.float32
        source.inputs = source.inputs.to(kind)
        model = network(0.0).to(kind)
        return weights_after(method, source, model, precision=precision, optimizer="sgd")

    tolerance = 1e-12 if precision == "fp32" else 1e-3
    torch.testing.assert_close(weights(in_passes), weights(None), rtol=0, atol=tolerance)


def test_passes_without_weights_are_refused():
    source = rounds(collate=lambda b: [Batch(b.inputs, b.targets, b.task_ids, b.counts)])
    with pytest.raises(ValueError, match="collate: must give its batches the samples' weights"):
        standard(network(), source, TrainConfig(epochs=1, lr=0.1))


def test_validation_runs_in_passes():
    model, whole = network(0.0), validation()
    parts = RoundLoader(*data(60, seed=1), batch_size=20, shuffle=False, collate=in_passes)
    assert evaluate(model, parts) == evaluate(model, whole)


def test_a_task_without_samples_has_no_part_in_the_mean_of_a_validation():
    inputs, labels, ids = data(60, seed=1)
    model, source = network(0.0), RoundLoader(inputs, labels, ids, batch_size=20, shuffle=False)
    whole = evaluate(model, source).per_task
    source.collate = lambda batch: [replace(p, collate=None) for p in batch.by_task()[::2]]
    found = evaluate(model, source)
    assert (found.per_task[0], found.per_task[2]) == (whole[0], whole[2])
    assert math.isnan(found.per_task[1])
    assert found.mean == (whole[0] + whole[2]) / 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("order", ["rounds", "proportional"])
def test_a_task_may_be_without_samples(method, order):
    """It keeps its adapters and its head; in the validation it has no part."""
    inputs, labels, ids = data()
    some = {"batch_size": 10, "num_tasks": 4}
    source = RoundLoader(inputs, labels, ids + (ids > 0), order=order, **some)
    few = ids < 2
    held_out = RoundLoader(inputs[few], labels[few], ids[few], **some)
    config, model = TrainConfig(epochs=2, lr=0.01), network()
    result = METHODS[method](model, source, config, validation=held_out)
    assert all(p.isfinite().all() for p in model.parameters())
    found = result.history[-1]["validation_per_task"]
    assert [math.isnan(value) for value in found] == [False, False, True, True]
    if method == "last-layer-ml":
        kept = [torch.equal(own["head.weight"], network().head.weight) for own in result.adapters]
        assert kept == [False, True, False, False]


def test_mappings_are_keywords_and_logits_are_taken():
    class Named(Network):
        def forward(self, *, values):
            return SimpleNamespace(logits=super().forward(values))

    inputs, labels, ids = data()
    torch.manual_seed(0)
    model = Named(0.1)
    weights = weights_after(
        "lora-ml", RoundLoader({"values": inputs}, labels, ids, batch_size=10, seed=1), model
    )
    assert torch.equal(weights, weights_after("lora-ml"))


def test_own_loss_and_forward():
    def squared(outputs, batch):
        return (outputs[:, 0] - batch.targets).square()

    def forward(model, inputs):
        return 2 * model(inputs)

    config = TrainConfig(epochs=1, lr=1e-12)
    result = standard(network(0.0), rounds(max_rounds=1), config, loss=squared, forward=forward)
    (batch,) = rounds(max_rounds=1)
    by_task = [squared(2 * network(0.0)(part.inputs), part).mean() for part in batch.by_task()]
    assert result.history[0]["loss"] == pytest.approx(sum(by_task).item() / T)
    with pytest.raises(ValueError, match=r"one loss per sample, \[30\], got \[\]"):
        standard(network(), rounds(), config, loss=lambda outputs, batch: outputs.mean())


def test_a_loss_that_is_not_finite_stops_the_training():
    with pytest.raises(DivergedError, match=r"the loss of a step is (nan|inf); lower lr=1e\+3"):
        standard(network(), rounds(), TrainConfig(epochs=3, lr=1e30, optimizer="sgd"))
    assert issubclass(DivergedError, FloatingPointError)


@pytest.mark.parametrize("average", [None, False, True])
def test_the_weights_stay_those_of_the_last_good_step(average):
    """The loss is NaN from the fifth pass on; Reptile is then inside a second outer step."""
    passes, after_step = [], []

    def loss(outputs, batch):
        passes.append(None)
        return cross_entropy(outputs, batch) * (math.nan if len(passes) >= 5 else 1.0)

    class Keep(Callback):
        def on_step(self, training, loss):
            after_step.append(flat(training.model))

    model, config = network(), TrainConfig(epochs=3, lr=0.1)
    retrain, options = standard, {}
    if average is not None:
        retrain, options = reptile, {"average": average, "inner_steps": 1 if average else 3}
    with pytest.raises(DivergedError, match="the loss of a step is nan"):
        retrain(model, rounds(), config, loss=loss, callbacks=[Keep()], **options)
    assert len(after_step) >= 1 and len(passes) == 5
    assert torch.equal(flat(model), after_step[-1]) and torch.isfinite(flat(model)).all()


@pytest.mark.parametrize(("lr", "decay"), [(0.003, None), (None, 0.7)])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_adapters_have_a_rate_and_a_decay_of_their_own(optimizer, lr, decay):
    """After one step the shared weights are the same; adapters moved by their own rate."""
    config = TrainConfig(epochs=1, lr=0.1, weight_decay=0.1, optimizer=optimizer)
    changed = replace(config, adapter_lr=lr, adapter_weight_decay=decay)
    adapter = LoRAConfig(rank=2, heads=[])
    found = []
    for settings in (config, changed):
        model = network()
        result = lora_ml(model, rounds(max_rounds=1), settings, adapter)
        found.append((flat(model), torch.cat([t.flatten() for t in result.adapters[0].values()])))
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.allclose(found[0][1], found[1][1], rtol=1e-3)
    tuned = []
    for settings in (config, changed):
        result = finetune_lora(network(), rounds(max_rounds=1), settings, adapter)
        tuned.append(torch.cat([t.flatten() for t in result.adapters[0].values()]))
    assert not torch.allclose(*tuned, rtol=1e-3)


def test_the_rate_of_adapters_is_scheduled_too():
    rates = []

    class Rates(Callback):
        def on_step(self, training, loss):
            rates.append([group["lr"] for group in training.step.optimizer.param_groups])

    config = TrainConfig(epochs=2, lr=0.1, adapter_lr=0.02, schedule="linear")
    lora_ml(network(), rounds(max_rounds=1), config, LORA, callbacks=[Rates()])
    assert rates == [pytest.approx([0.1, 0.02]), pytest.approx([0.05, 0.01])]
    wrong = {"adapter_lr": 0.0, "adapter_weight_decay": -1.0}
    for name, value in wrong.items():
        with pytest.raises(ValueError, match=f"TrainConfig: {name} must be a finite number >"):
            replace(config, **{name: value})


def test_a_failed_retraining_gives_the_plain_model_back():
    model = network()
    layout = str(model)
    with pytest.raises(ZeroDivisionError):
        lora_ml(model, rounds(), TrainConfig(epochs=1, lr=0.1), LORA, validation=lambda m: 1 / 0)
    assert str(model) == layout


@pytest.mark.parametrize("method", METHODS)
def test_adapted_models_are_refused(method):
    model = network()
    finetune_lora(model, rounds(), TrainConfig(epochs=1, lr=0.01), LORA)
    with pytest.raises(ValueError, match="the model has adapters already"):
        METHODS[method](model, rounds(), TrainConfig(epochs=1, lr=0.01))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": float("nan")}, "reptile: inner_lr must be a finite number > 0, got nan"),
        ({"inner_steps": 0}, "reptile: inner_steps must be an int >= 1"),
        ({"inner_optimizer": "sdg"}, "did you mean 'sgd'"),
        ({"outer_sign": "toward"}, "did you mean 'towards'"),
    ],
)
def test_bad_reptile_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        reptile(network(), rounds(), TrainConfig(epochs=1, lr=0.1), **options)


@pytest.mark.parametrize("method", [last_layer_ml, finetune_last_layer])
def test_missing_heads_are_refused(method):
    with pytest.raises(ValueError, match="heads must name at least one layer"):
        method(network(), rounds(), TrainConfig(epochs=1, lr=0.1), heads=[])
    with pytest.raises(ValueError, match="matches 'heed'; did you mean 'head'"):
        method(network(), rounds(), TrainConfig(epochs=1, lr=0.1), heads=["heed"])


@pytest.mark.parametrize("method", METHODS)
def test_an_unknown_keyword_is_named_before_anything_happens(method):
    model, config = network(), TrainConfig(epochs=1, lr=0.1)
    named = rf"^{method.replace('-', '_')}\(\) got .* argument 'calbacks'; did you mean 'callbacks'"
    with pytest.raises(TypeError, match=named):
        METHODS[method](model, rounds(), config, calbacks=[])
    assert not adapted_layers(model)


def test_nothing_to_train_is_refused():
    model = network().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        standard(model, rounds(), TrainConfig(epochs=1, lr=0.1))


@pytest.mark.parametrize("shape", [(9,), (9, 1), (9, 4), (9, 2, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_squared_error(shape, dtype):
    torch.manual_seed(0)
    outputs, targets = torch.randn(shape, dtype=dtype), torch.randn(shape)
    batch = Batch(None, targets, torch.zeros(9, dtype=torch.int64))
    found = squared_error(outputs, batch)
    wanted = (outputs.double() - targets.double()).square().reshape(9, -1).mean(1)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)
    if len(shape) > 1 and shape[1] > 1:
        with pytest.raises(ValueError, match=r"same shape, got \[9, .*\] and \[9\]"):
            squared_error(outputs, replace(batch, targets=torch.randn(9)))
    else:
        for other in ((9,), (9, 1)):
            again = squared_error(outputs.reshape(other), batch)
            assert torch.equal(again, found)
        with pytest.raises(ValueError, match=r"and \[8\]"):
            squared_error(outputs, replace(batch, targets=torch.randn(8)))


def test_the_squared_error_of_no_tensor():
    with pytest.raises(TypeError, match="squared_error: the model must return a tensor, got tuple"):
        squared_error((1,), Batch(None, torch.zeros(1), torch.zeros(1, dtype=torch.int64)))


@pytest.mark.parametrize("method", ["lora-ml", "last-layer-ml"])
def test_a_base_that_is_frozen_is_not_retrained(method):
    """As PEFT leaves it; after a fine-tuning of ours it is trained again."""
    config = TrainConfig(epochs=1, lr=0.1)
    model = network().requires_grad_(False)
    model.head.requires_grad_(True)
    if method == "last-layer-ml":
        retrain = partial(last_layer_ml, heads=["head"])
    else:
        retrain = partial(lora_ml, lora_config=replace(LORA, heads=["head"]))
    name = method.replace("-", "_")
    with pytest.raises(
        ValueError, match=rf"{name}: all weights that tasks share are frozen, .*_gr"
    ):
        retrain(model, rounds(), config)
    assert not adapted_layers(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]

    model = network()
    finetune_lora(model, rounds(), config, LORA)
    merge_and_unload(model, 0)
    before = model.body[0].weight.detach().clone()
    retrain(model, rounds(), config)
    assert not torch.equal(model.body[0].weight, before)


SHORT_TRAINED = {
    "standard": (standard, (), "train: 4 of 4"),
    "reptile": (reptile, (), "reptile: 4 of 4"),
    "lora-ml": (lora_ml, (LORA,), "TaskOptimizer: 8 of 8"),
    "finetune-lora": (finetune_lora, (LORA,), "TaskOptimizer: 4 of 4"),
}


@pytest.mark.parametrize("method", SHORT_TRAINED)
def test_training_weights_stored_in_16_bits_warns(method):
    """Once, of those that are trained; not where the products alone are in 16 bits."""
    function, more, start = SHORT_TRAINED[method]
    config = TrainConfig(epochs=1, lr=0.1)
    inputs, labels, ids = data()
    short = RoundLoader(inputs.bfloat16(), labels, ids, batch_size=10)
    with pytest.warns(
        UserWarning, match=rf"^{start} trained .* torch.bfloat16, .*\.float\(\)"
    ) as w:
        function(network().bfloat16(), short, config, *more)
    assert len(w) == 1 and w[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        function(network(), rounds(), replace(config, precision="bf16"), *more)


@pytest.mark.slow
def test_importing_brings_no_optional_package():
    code = (
        "import sys, torch; before = set(sys.modules);"
        "import metalora.meta, metalora.adapters, metalora.nn;"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before};"
        "print(new & {'tqdm', 'peft', 'transformers', 'safetensors', 'torchvision'})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


class Returns(Network):
    """A network whose logits are somewhere in its outputs."""

    def __init__(self, wrap):
        super().__init__(0.0)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(super().forward(x))


def test_logits_of_a_dictionary_are_taken():
    torch.manual_seed(0)
    model = Returns(lambda logits: {"logits": logits, "hidden": None})
    torch.manual_seed(0)
    assert torch.equal(
        weights_after("lora-ml", model=model), weights_after("lora-ml", None, Network(0.0))
    )


LOADER = DataLoader(TensorDataset(*data()), batch_size=8)


def labelled(change):
    """The tasks with other targets."""
    inputs, labels, ids = data()
    return RoundLoader(inputs, change(labels), ids, batch_size=10)


REGRESSION = RoundLoader(data()[0], data()[0][:, :1], data()[2], batch_size=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": Returns(lambda logits: (logits, None))}, r"\['logits'\], got tuple; pass loss="),
        ({"model": Returns(lambda logits: {"y": logits})}, r"must return logits .* got dict"),
        (
            {"model": Returns(lambda y: y[:, None])},
            r"got \[30, 1, 2\]; of a causal .*mean_token_loss",
        ),
        ({"model": Returns(lambda y: y[:, 0])}, r"must be \[B, classes\], got \[30\]; pass loss="),
        ({"rounds": REGRESSION}, r"targets must be class .* got float32 \[30, 1\]; for a regress"),
        ({"rounds": labelled(lambda y: y + 7)}, r"must be in \[0, 2\), as .* got 7 to 8"),
        ({"rounds": labelled(torch.Tensor.int)}, r"must be int64 \[30\], .* got int32 \[30\]"),
        ({"rounds": labelled(lambda y: y[:, None])}, r"must be int64 \[30\], .* int64 \[30, 1\]"),
        (
            {"loss": mean_token_loss},
            r"mean_token_loss: pass forward=.* outputs of type Tensor",
        ),
        ({"loss": F.cross_entropy}, r"\(outputs, batch\).* got cross_entropy; for instance loss="),
        ({"loss": partial(F.mse_loss, reduction="none")}, "got mse_loss; for instance"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "got CrossEntropyLoss; for instance"),
        ({"loss": "mse"}, "loss: must be a function .* got str"),
        ({"loss": lambda outputs, batch: 1.0}, "one loss per sample, .* got float"),
        (
            {"rounds": LOADER},
            "lora_ml: rounds must be a .*RoundLoader.* got DataLoader; .*own-data",
        ),
        ({"validation": LOADER}, "train: validation must be a .* got DataLoader"),
        (
            {"callbacks": Callback()},
            r"callbacks must be a list .* got Callback; .*\[Callback\(\)\]",
        ),
        ({"callbacks": [Callback]}, "each of callbacks must be an object .* got <class"),
        ({"callbacks": [print]}, "each of callbacks must be an object .* got <built-in"),
    ],
)
def test_common_mistakes_end_in_one_line(change, message):
    arguments = {"model": network(), "rounds": rounds(), **change}
    model, source = arguments.pop("model"), arguments.pop("rounds")
    with pytest.raises((TypeError, ValueError), match=message) as caught:
        lora_ml(model, source, TrainConfig(epochs=1, lr=0.01), LORA, **arguments)
    assert "\n" not in str(caught.value)


def test_a_loader_without_tasks_is_not_evaluated():
    with pytest.raises(TypeError, match=r"evaluate: loader must be .*RoundLoader.* got DataLoader"):
        evaluate(network(), LOADER)


@pytest.mark.parametrize(
    ("outputs", "targets"), [(2, torch.float32), (1, torch.int64), (1, torch.float32)]
)
def test_the_accuracy_of_a_regression_is_refused(outputs, targets):
    inputs, labels, ids = data()
    source = RoundLoader(inputs, labels.to(targets), ids, batch_size=10)
    with pytest.raises(ValueError, match=r"accuracy: outputs must be logits .*validation=lambda"):
        standard(
            nn.Linear(8, outputs), source, TrainConfig(epochs=1, lr=0.01), validation=source,
            loss=lambda outputs, batch: outputs.square().sum(1), callbacks=[KeepBest()],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("method", "fields"),
    [
        ("standard", {"grad_clip": 1.0}),
        ("lora-ml", {}),
        ("lora-ml", {"adapter_steps": 2}),
        ("reptile", {}),
    ],
)
def test_nan_in_the_data_is_not_blamed_on_the_learning_rate(method, fields):
    inputs, labels, ids = data()
    config = TrainConfig(epochs=1, lr=0.01, **fields)
    source = RoundLoader(inputs * math.nan, labels, ids, batch_size=10)
    with pytest.raises(DivergedError, match=r"first step is nan; look for NaN .* in inputs, targ"):
        METHODS[method](network(), source, config)


def test_clipping_is_not_advised_where_it_is_done():
    for grad_clip, advised in ((None, True), (1e30, False)):
        config = TrainConfig(epochs=3, lr=1e30, optimizer="sgd", grad_clip=grad_clip)
        with pytest.raises(DivergedError, match=r"a step is .* lower lr=1e\+30") as caught:
            standard(network(), rounds(), config)
        assert ("clip gradients" in str(caught.value)) == advised


def test_the_first_loss_is_looked_at_where_only_the_epoch_is(monkeypatch):
    """As on a GPU, where a step is not waited for."""
    monkeypatch.setattr("metalora.meta.steps.Step._check_finite", lambda *args, **kwargs: None)
    inputs, labels, ids = data()
    for lr, factor, message in ((0.01, math.nan, "look for NaN"), (1e30, 1.0, "lower lr")):
        source = RoundLoader(inputs * factor, labels, ids, batch_size=10)
        with pytest.raises(DivergedError, match=rf"mean loss of epoch 0 is (nan|inf); {message}"):
            standard(network(), source, TrainConfig(epochs=1, lr=lr, optimizer="sgd"))


class PartlyUsed(Network):
    """Has a layer that is never called, and one that is called from some pass on."""

    def __init__(self, first_pass=0):
        super().__init__(0.0)
        self.unused, self.late = nn.Linear(8, 8), nn.Linear(8, 8)
        self.passes, self.first_pass = 0, first_pass

    def forward(self, x):
        self.passes += 1
        return super().forward(self.late(x) if self.passes > self.first_pass else x)


@pytest.mark.parametrize(
    ("num_tasks", "optimizer", "epochs", "steps"),
    [(1, "adam", 3, 9), (1, "sgd", 3, 9), (T, "adam", 4, 9), (T, "sgd", 5, 9), (T, "adam", 2, 6)],
)
def test_adapters_that_are_never_called_are_named_once(num_tasks, optimizer, epochs, steps):
    inputs, labels, ids = data()
    source = RoundLoader(inputs, labels, ids % num_tasks, batch_size=10)
    config = TrainConfig(epochs=epochs, lr=0.01, optimizer=optimizer)
    with pytest.warns(UserWarning, match="no gradient has reached") as warned:
        lora_ml(PartlyUsed(), source, config, LORA)
    (message,) = [str(w.message) for w in warned if "reached" in str(w.message)]
    assert f"the adapters of 'unused' in {steps} steps" in message


@pytest.mark.parametrize(("epochs", "first_pass"), [(1, 0), (3, 8)])
def test_a_layer_may_be_absent_in_a_short_run_and_at_first(epochs, first_pass):
    model = PartlyUsed(first_pass)
    if first_pass:
        del model.unused
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source = rounds(max_rounds=None if first_pass else 2)
        lora_ml(model, source, TrainConfig(epochs=epochs, lr=0.01), LORA)


@pytest.mark.parametrize("kept", [False, True])
def test_batch_statistics_are_kept_as_the_docstring_says(kept):
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    example = re.search(
        r"( +def forward.*?return model\(inputs\))", finetune_lora.__doc__, re.DOTALL
    )
    made = {"torch": torch}
    exec(textwrap.dedent(example[1]), made)
    options = {"forward": made["forward"]} if kept else {}
    finetune_lora(model, rounds(), TrainConfig(epochs=1, lr=0.01), LORA, **options)
    assert bool((model[1].running_mean == 0).all()) == kept
