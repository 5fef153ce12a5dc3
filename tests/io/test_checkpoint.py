"""A training that was interrupted ends in the same bits as one that was not."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from metalora.adapters import LoRAConfig
from metalora.io import Checkpoint, CheckpointError
from metalora.io.checkpoint import _VALUES, read, write
from metalora.meta import (
    Callback,
    KeepBest,
    RoundLoader,
    TrainConfig,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    reptile,
    standard,
)

LORA = LoRAConfig(rank=2, dropout=0.2)
METHODS = {
    "standard": standard,
    "lora-ml": lambda *args, **options: lora_ml(*args, LORA, **options),
    "last-layer-ml": lambda *args, **options: last_layer_ml(*args, ["3"], **options),
    "reptile": lambda *args, **options: reptile(*args, inner_steps=2, **options),
    "finetune-lora": lambda *args, **options: finetune_lora(*args, LORA, **options),
}


def rounds(seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(40, 6, generator=generator)
    ids = torch.tensor([0] * 22 + [1] * 18)
    return RoundLoader(inputs, (inputs[:, 0] > 0).long(), ids, **{"batch_size": 5, **options})


def network(width=8):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Dropout(0.2), nn.Linear(width, 2))


class Interrupt(Callback):
    """Stops the training in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_step(self, training, loss):
        if training.steps_done == self.step:
            raise KeyboardInterrupt


class Nothing(Interrupt):
    """The same kind of callback, which lets the training go on."""

    def on_step(self, training, loss):
        pass


Nothing.__name__ = "Interrupt"


def run(method, config, path=None, interrupt=None, model=None):
    model = network() if model is None else model
    stop = Nothing(0) if interrupt is None else Interrupt(interrupt)
    callbacks = [stop, KeepBest()] + ([] if path is None else [Checkpoint(path)])
    result = METHODS[method](model, rounds(), config, validation=rounds(1), callbacks=callbacks)
    return model.state_dict(), result


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"step_per": "task", "optimizer": "adamw", "weight_decay": 0.1},
        {"precision": "fp16", "schedule": "linear", "schedule_unit": "step", "warmup": 0.3},
        {"optimizer": "sgd", "precision": "bf16", "grad_clip": 0.1, "schedule": "cosine"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_equals_uninterrupted(method, fields, tmp_path):
    config = TrainConfig(**{"epochs": 5, "lr": 0.03, "seed": 7, **fields})
    want, whole = run(method, config)
    path = tmp_path / "deep" / "run.safetensors"
    for step in (8, 17):
        with pytest.raises(KeyboardInterrupt):
            run(method, config, path, interrupt=step)
        torch.manual_seed(step)
    got, resumed = run(method, config, path)
    assert resumed.history == whole.history
    assert (resumed.kept_epoch, resumed.best_metric) == (whole.kept_epoch, whole.best_metric)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert torch.equal(value, want[name]), name
    for ours, theirs in zip(resumed.adapters, whole.adapters, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_training_only_gives_its_result(tmp_path):
    path, config = tmp_path / "run.safetensors", TrainConfig(epochs=2, lr=0.03)
    want, first = run("lora-ml", config, path)
    got, second = run("lora-ml", config, path)
    assert second.history == first.history
    assert all(torch.equal(got[name], want[name]) for name in want)


CONFIG = TrainConfig(epochs=3, lr=0.03)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        run("standard", CONFIG, path, interrupt=8)
    return path


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(f"Checkpoint: {saved} is damaged")):
        run("standard", CONFIG, saved)


def test_any_flipped_bit_is_noticed(saved):
    data = saved.read_bytes()
    for position in range(0, len(data), 61):
        damaged = bytearray(data)
        damaged[position] ^= 4
        saved.write_bytes(damaged)
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(CheckpointError):
            run("standard", CONFIG, saved, model=model)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Evil:
    def __reduce__(self):
        return os.abort, ()


def test_foreign_files_are_refused_and_never_unpickled(saved):
    saved.write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        run("standard", CONFIG, saved)
    torch.save({"model": torch.zeros(1)}, saved)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint"):
        run("standard", CONFIG, saved)
    save_file({"weight": torch.zeros(2)}, saved)
    with pytest.raises(CheckpointError, match="is no checkpoint of metalora"):
        run("standard", CONFIG, saved)


@pytest.mark.parametrize(
    ("method", "fields", "width", "message"),
    [
        ("standard", {"lr": 0.04}, 8, "does not fit the training: lr is 0.03 instead of 0.04"),
        ("standard", {"epochs": 4}, 8, "epochs is 3 instead of 4"),
        ("standard", {"seed": 1}, 8, "seed is 0 instead of 1"),
        ("reptile", {}, 8, "step is 'GradientStep' instead of 'ReptileStep'"),
        ("lora-ml", {}, 8, "does not fit the model: 0.lora_A is None instead of"),
        ("standard", {}, 9, "0.weight is 'torch.float32 [8, 6]' instead of 'torch.float32 [9, 6]'"),
    ],
)
def test_another_trainings_file_is_refused(saved, method, fields, width, message):
    config = TrainConfig(**{"epochs": 3, "lr": 0.03, **fields})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        run(method, config, saved, model=network(width))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.5}, "inner_lr is 0.01 instead of 0.5"),
        ({"outer_sign": "away"}, "outer_sign is 'towards' instead of 'away'"),
        ({"inner_optimizer": "adam"}, "inner_optimizer is 'sgd' instead of 'adam'"),
        ({"average": True}, "average is False instead of True"),
        ({"inner_steps": 1}, "inner_steps is 20 instead of 1"),
    ],
)
def test_the_settings_of_a_step_must_be_those_of_the_file(options, message, tmp_path):
    path = tmp_path / "run.safetensors"
    reptile(network(), rounds(), CONFIG, inner_lr=0.01, callbacks=[Checkpoint(path)])
    with pytest.raises(CheckpointError, match=re.escape(f"does not fit the training: {message}")):
        reptile(network(), rounds(), CONFIG, **options, callbacks=[Checkpoint(path)])


def test_pooled_and_separate_tasks_are_other_trainings(tmp_path):
    path = tmp_path / "run.safetensors"
    standard(network(), rounds(batch_size=20), CONFIG, callbacks=[Checkpoint(path)])
    with pytest.raises(CheckpointError, match="pooled is False instead of True"):
        standard(network(), rounds(order="pooled"), CONFIG, callbacks=[Checkpoint(path)])


@pytest.mark.parametrize("change", [{"alpha": 3}, {"dropout": 0.0}])
def test_other_adapters_are_refused_even_of_the_same_shapes(change, tmp_path):
    path = tmp_path / "run.safetensors"
    lora_ml(network(), rounds(), CONFIG, LORA, callbacks=[Checkpoint(path)])
    other = replace(LORA, **change)
    with pytest.raises(CheckpointError, match="does not fit the adapters: 0 is 'MultiTaskLoRAL"):
        lora_ml(network(), rounds(), CONFIG, other, callbacks=[Checkpoint(path)])


KEYS = [*_VALUES]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", ["missing", "wrong"])
def test_a_well_formed_file_that_is_incomplete_is_refused(saved, key, change):
    tensors, values = read(saved)
    assert {*values} == {"format", *KEYS}
    values[key] = "nonsense"
    if change == "missing":
        del values[key]
    refused(saved, tensors, values, f"must hold {key!r}, a ")


def test_well_formed_files_with_senseless_parts_are_refused(saved):
    tensors, values = read(saved)
    callbacks = values["callbacks"]
    refused(saved, tensors, {**values, "callbacks": [{"kind": "KeepBest"}]}, "must hold 'values'")
    refused(saved, tensors, {**values, "callbacks": [3]}, "must hold 'kind', a str, got None")
    for callback in callbacks:
        callback["values"] = {}
    refused(saved, tensors, values, "does not fit KeepBest: 'best'")
    for name in ("optimizer.99.exp_avg", "optimizer.x.exp_avg"):
        strange = {**tensors, name: torch.zeros(2)}
        refused(saved, strange, values, f"has optimizer state {name[10:]!r}")


def test_a_list_instead_of_values_is_refused(saved, monkeypatch):
    monkeypatch.setattr("metalora.io.checkpoint.json.loads", lambda text: [1])
    with pytest.raises(CheckpointError, match=re.escape("'metalora training 1', got [1]")):
        read(saved)


def refused(path, tensors, values, message):
    write(path, tensors, values)
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(message)):
        run("standard", CONFIG, path, model=model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_without_safetensors_the_error_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError) as caught:
        Checkpoint(tmp_path / "run.safetensors")
    message = str(caught.value)
    assert message == "Checkpoint: needs the package safetensors; pip install safetensors"


def test_a_failed_save_leaves_the_last_good_file(saved, monkeypatch):
    before = saved.read_bytes()

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left"):
        run("standard", CONFIG, saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_an_existing_file_is_not_overwritten_without_resume(saved):
    with pytest.raises(CheckpointError, match="exists; go on with resume=True"):
        standard(network(), rounds(), CONFIG, callbacks=[Checkpoint(saved, resume=False)])


def test_it_must_be_the_last_callback(tmp_path):
    with pytest.raises(ValueError, match="must be the last of the callbacks"):
        standard(
            network(),
            rounds(),
            CONFIG,
            validation=rounds(1),
            callbacks=[Checkpoint(tmp_path / "run"), KeepBest()],
        )


KILLED = """
import sys, torch
from pathlib import Path
sys.path.insert(0, {folder!r})
from test_checkpoint import CONFIG_LONG, METHODS, network, rounds
from metalora.io import Checkpoint
from metalora.meta import KeepBest
METHODS["lora-ml"](network(), rounds(), CONFIG_LONG, validation=rounds(1),
                   callbacks=[KeepBest(), Checkpoint(Path({path!r}))])
"""
CONFIG_LONG = TrainConfig(epochs=40, lr=0.03)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs POSIX signals")
def test_killed_at_a_random_moment_it_goes_on(tmp_path):
    path = tmp_path / "run.safetensors"
    code = KILLED.format(folder=os.path.dirname(__file__), path=str(path))  # noqa: PTH120
    for delay in (0.03, 0.11):
        child = subprocess.Popen([sys.executable, "-c", code])
        before = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.monotonic() + 120
        while not path.exists() or path.stat().st_mtime_ns == before:
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(delay)
        child.kill()
        assert child.wait() == -signal.SIGKILL
    models = []
    for callbacks in ([KeepBest()], [KeepBest(), Checkpoint(path)]):
        models.append(network())
        METHODS["lora-ml"](
            models[-1], rounds(), CONFIG_LONG, validation=rounds(1), callbacks=callbacks
        )
    for got, want in zip(models[1].parameters(), models[0].parameters(), strict=True):
        assert torch.equal(got, want)
