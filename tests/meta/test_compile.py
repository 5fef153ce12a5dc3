"""Compiled trainings: compiled once for all batches, with the results of others."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial, partialmethod

import pytest
import torch
from torch import nn

from experiments.vision.mixer import Mixer, MixerConfig
from metalora._library import native_available
from metalora.adapters import LoRAConfig
from metalora.hf import SequencePasses, enable_packing
from metalora.meta import (
    Callback,
    Checkpoint,
    RoundLoader,
    TrainConfig,
    compiling,
    finetune_last_layer,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    peft_ml,
    reptile,
    standard,
)
from metalora.meta.steps import call_model
from tests.hf.models import PAD, roberta, sequences

CONFIG = TrainConfig(2, 0.01, compile=True)
LORA = LoRAConfig(rank=2)
METHODS = {
    "standard": standard,
    "lora-ml": partial(lora_ml, lora_config=LORA),
    "last-layer-ml": partial(last_layer_ml, heads=["head"]),
    "reptile": partial(reptile, inner_steps=2),
    "finetune-lora": partial(finetune_lora, lora_config=LORA),
    "finetune-last-layer": partial(finetune_last_layer, heads=["head"]),
}
needs_native = pytest.mark.skipif(
    not native_available(), reason="the reference asks task_ptr for its values"
)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU())
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x)).mean(1)


def rounds(count=40, seed=0, **options):
    """Three tasks of 2, 4 and 34 in 40 samples: few rounds have all of them."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, 8, generator=generator)
    ids = (torch.arange(count) * 20 // count).clamp_max(2)
    options = {"batch_size": 7, "seed": 1, **options}
    return RoundLoader(inputs, (inputs[:, 0, 0] > 0).long(), ids, **options)


def labels(count=40):
    """Targets and tasks of `rounds`."""
    return torch.arange(count) % 2, (torch.arange(count) * 20 // count).clamp_max(2)


def halves(batch):
    """Passes of unequal size, in the order of the tasks."""
    size = (len(batch.task_ids) + 2) // 3
    for rows in filter(len, torch.arange(len(batch.task_ids)).tensor_split([size])):
        yield batch.take(rows, tuple(torch.bincount(batch.task_ids[rows]).tolist()))


@pytest.fixture
def graphs(monkeypatch):
    """Returns the number of compilations since then; only traced, as a C++ compiler takes long."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    monkeypatch.setattr(compiling, "_check_compiler", lambda device: None)
    counters.clear()
    return lambda: counters["stats"]["unique_graphs"]


def train_both(method, source, **fields):
    """The results and the weights of an eager and of a compiled training."""
    found = []
    for compile in (False, True):
        model, config = Network(), replace(CONFIG, compile=compile, **fields)
        result = METHODS[method](model, source, config, validation=rounds(23, 5, batch_size=9))
        found += [result, model.state_dict()]
    return found


CASES = [*((method, "fp32") for method in METHODS), ("lora-ml", "bf16")]


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize(("method", "precision"), CASES)
def test_compiles_twice_at_most_and_changes_nothing(method, precision, graphs):
    want, weights, got, compiled = train_both(method, rounds(collate=halves), precision=precision)
    # One for training, one for evaluation. In bf16 layers have two routes, by the number of rows.
    assert graphs() == 2 if precision == "fp32" else graphs() <= 4
    assert compiled.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(compiled[name], weight, msg=name)
    losses = [record["loss"] for record in got.history]
    assert losses == pytest.approx([record["loss"] for record in want.history])


def test_the_model_is_plain_afterwards_and_all_names_stay(graphs):
    model, seen = Network(), []

    class Look(Callback):
        def on_step(self, training, loss):
            seen.append((model._compiled_call_impl is not None, list(model.state_dict())))

    standard(model, rounds(), CONFIG, callbacks=[Look()])
    assert seen[0] == (True, list(Network().state_dict()))
    assert model._compiled_call_impl is None and graphs() == 1
    with pytest.raises(ZeroDivisionError):
        standard(model, rounds(), CONFIG, validation=lambda model: 1 / 0)
    assert model._compiled_call_impl is None


def test_a_model_compiled_in_place_stays_so(graphs):
    model = Network()
    model.compile()
    own = model._compiled_call_impl
    standard(model, rounds(), CONFIG)
    assert model._compiled_call_impl is own


def test_a_wrapped_model_is_refused():
    with pytest.raises(ValueError, match=r"compile=True takes a plain model .* got one wrapped"):
        standard(torch.compile(Network()), rounds(), CONFIG)


@needs_native
def test_an_error_inside_is_the_layers_own(graphs):
    def too_narrow(model, inputs):
        return call_model(model, inputs[..., :5])

    with pytest.raises(ValueError, match=r"'body.0': x must be \[B, \.\.\., in=8\]"):
        lora_ml(Network(), rounds(), CONFIG, LORA, forward=too_narrow)


@pytest.mark.slow
def test_a_resumed_training_ends_as_one_that_never_stopped(graphs, tmp_path):
    class Stop(Callback):
        def __init__(self, at):
            self.at = at

        def on_step(self, training, loss):
            if training.steps_done == self.at:
                raise KeyboardInterrupt

    def run(model, stop):
        callbacks = [Stop(stop), Checkpoint(tmp_path / "run.safetensors", resume=stop is None)]
        standard(model, rounds(), CONFIG, callbacks=callbacks)

    whole, stopped = Network(), Network()
    standard(whole, rounds(), CONFIG)
    with pytest.raises(KeyboardInterrupt):
        run(stopped, stop=8)  # in the second of two epochs
    resumed = Network()
    run(resumed, stop=None)
    for got, want in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(got, want)


@needs_native
@pytest.mark.slow
def test_packed_sequences_of_other_lengths_are_not_compiled_again(graphs):
    """transformers' models come in several pieces, none of which depends on the lengths."""
    lengths = torch.randint(3, 12, (24,)).tolist()
    labels, histories, counts = (torch.arange(24) % 2, torch.arange(24) // 8), [], []

    class Count(Callback):
        def on_epoch(self, training, record):
            counts.append(graphs())

    for compile in (False, True):
        model = enable_packing(
            roberta(num_hidden_layers=1, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
        )
        passes = SequencePasses(
            sequences(lengths),
            packed=True,
            max_tokens=40,
            pad_token_id=PAD,
            position_offset=PAD + 1,
        )
        source = RoundLoader(torch.arange(24), *labels, batch_size=5, seed=1, collate=passes)
        config, lora = replace(CONFIG, epochs=3, compile=compile), LoRAConfig(rank=2)
        options = {"validation": source, "callbacks": [Count()]}
        histories.append(lora_ml(model, source, config, lora, **options).history)
    assert counts[:3] == [0, 0, 0] and counts[3] > 0
    assert counts[3] == counts[5]
    losses = [[record["loss"] for record in history] for history in histories]
    assert losses[0] == pytest.approx(losses[1])


def test_layers_of_peft_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["body.0"], use_dora=True)
    with pytest.raises(ValueError, match="peft_ml: compile must be False with peft's own layers"):
        peft_ml(Network(), rounds(), CONFIG, config)


@pytest.mark.parametrize("value", [1, None, "inductor"])
def test_compile_is_true_or_false(value):
    with pytest.raises(TypeError, match="TrainConfig: compile must be True or False, got "):
        TrainConfig(1, 0.1, compile=value)


@pytest.mark.slow
def test_without_a_compiler_one_line_says_what_to_install(tmp_path):
    program = (
        "from tests.meta.test_compile import *\n"
        "try:\n"
        "    standard(Network(), rounds(), CONFIG)\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    without = {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **without}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()
    assert line.startswith("train: compile=True needs what torch.compile needs, but it fails here:")
    assert line.endswith("install a C++ compiler, such as g++ (or set CXX), or set compile=False")


@needs_native
@pytest.mark.slow
def test_compiled_to_machine_code_a_mixer_learns_the_same():
    """Also the masks of its dropout are the same, and differ between equal layers."""
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    config = MixerConfig(
        image_size=8, channels=1, patch_size=2, width=16, token_hidden=16, channel_hidden=16
    )
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        model = Mixer(config)
        source = RoundLoader(torch.randn(40, 1, 8, 8), *labels(), batch_size=7, seed=1)
        lora_ml(model, source, replace(CONFIG, compile=compile), LORA)
        found.append(model.state_dict())
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-3, atol=1e-4, msg=name)
