"""What a training leaves behind: the caller's random state, and no half-adapted model."""

import threading
from functools import partial

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapted_layers
from metalora.meta import (
    Callback,
    RoundLoader,
    TrainConfig,
    finetune_last_layer,
    finetune_lora,
    finetune_peft,
    last_layer_ml,
    lora_ml,
    peft_ml,
    reptile,
    standard,
)

LORA = LoRAConfig(rank=2)


def peft_config():
    peft = pytest.importorskip("peft", reason="needs the package peft")
    return peft.LoraConfig(r=2, target_modules=["0"], modules_to_save=["head"], use_dora=True)


METHODS = {
    "standard": standard,
    "reptile": lambda *args, **options: reptile(*args, inner_steps=2, **options),
    "lora-ml": lambda *args, **options: lora_ml(*args, LORA, **options),
    "last-layer-ml": partial(last_layer_ml, heads=["head"]),
    "peft-ml": lambda *args, **options: peft_ml(*args, peft_config(), **options),
    "finetune-lora": lambda *args, **options: finetune_lora(*args, LORA, **options),
    "finetune-last-layer": partial(finetune_last_layer, heads=["head"]),
    "finetune-peft": lambda *args, **options: finetune_peft(*args, peft_config(), **options),
}
RETRAINING = ["lora-ml", "last-layer-ml", "peft-ml"]
FINE_TUNING = ["finetune-lora", "finetune-last-layer", "finetune-peft"]
CONFIG = TrainConfig(epochs=1, lr=0.01)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(3), encoder)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        return self.head(self.body(x).mean(1))


def network():
    torch.manual_seed(0)
    model = Network().eval()
    model.body[0].bias.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    return model


def rounds():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 3, 8, generator=generator)
    return RoundLoader(inputs, (inputs.sum((1, 2)) > 0).long(), torch.arange(24) % 3, batch_size=4)


class Fail(Callback):
    def __init__(self, error):
        self.error = error

    def on_step(self, training, loss):
        raise self.error


def structure(model):
    """What a model consists of, apart from its tensors' values."""
    return (
        {name: (id(module), module.training) for name, module in model.named_modules()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        [
            module.activation_relu_or_gelu
            for module in model.modules()
            if hasattr(module, "linear1")
        ],
    )


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_it_was(model, before):
    layout, tensors = before
    assert structure(model) == layout
    for name, value in model.state_dict().items():
        assert torch.equal(value, tensors[name]), name


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("method", FINE_TUNING)
def test_a_failed_fine_tuning_leaves_the_model_as_it_was(method, error):
    model = network()
    before = structure(model), values(model)
    with pytest.raises(type(error)):
        METHODS[method](model, rounds(), CONFIG, callbacks=[Fail(error)])
    assert_as_it_was(model, before)


@pytest.mark.parametrize("method", FINE_TUNING)
def test_a_diverged_fine_tuning_leaves_the_model_as_it_was(method):
    model = network()
    before = structure(model), values(model)
    config = TrainConfig(epochs=1, lr=1e30, optimizer="sgd")
    with pytest.raises(FloatingPointError, match=r"of a step is (nan|inf); lower lr=1e\+30"):
        METHODS[method](model, rounds(), config, loss=lambda logits, batch: logits.pow(4).sum(1))
    assert_as_it_was(model, before)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), ZeroDivisionError()], ids=repr)
@pytest.mark.parametrize("method", RETRAINING)
def test_retraining_leaves_a_plain_model_whose_frozen_parameters_are_frozen(method, error):
    model = network()
    start, layout = values(model), str(model)
    if error is None:
        METHODS[method](model, rounds(), CONFIG)
    else:
        with pytest.raises(type(error)):
            METHODS[method](model, rounds(), CONFIG, callbacks=[Fail(error)])
    assert str(model) == layout
    assert not adapted_layers(model)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"body.0.bias", "head.bias"}
    assert torch.equal(model.body[0].bias, start["body.0.bias"])
    assert not torch.equal(model.body[0].weight, start["body.0.weight"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("error", [None, ZeroDivisionError()], ids=repr)
def test_the_random_state_of_the_caller_is_kept(method, error):
    model, source = network(), rounds()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    if error is None:
        METHODS[method](model, source, CONFIG)
    else:
        with pytest.raises(type(error)):
            METHODS[method](model, source, CONFIG, callbacks=[Fail(error)])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", METHODS)
def test_trainings_run_side_by_side_in_threads(method):
    """Without random draws in an epoch, for torch's generator belongs to the process."""
    method = METHODS[method]
    turn, failures = threading.Barrier(2, timeout=60), []

    class Alternate(Callback):
        def on_step(self, training, loss):
            turn.wait()

    def run(model):
        try:
            method(model, rounds(), CONFIG, callbacks=[Alternate()])
        except BaseException as error:
            failures.append(error)
            turn.abort()

    threads = [threading.Thread(target=run, args=(network(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
