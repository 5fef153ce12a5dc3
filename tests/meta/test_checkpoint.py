"""A training that was interrupted ends in the same bits as one that was not."""

import json
import math
import os
import pickle
import random
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
from metalora.meta import (
    Callback,
    Checkpoint,
    CheckpointError,
    KeepBest,
    RoundLoader,
    TrainConfig,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    reptile,
    standard,
)
from metalora.meta.checkpoint import _VALUES, _digest, read, write

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


def run(method, config, path=None, interrupt=None, model=None, every_steps=None):
    model = network() if model is None else model
    stop = Nothing(0) if interrupt is None else Interrupt(interrupt)
    saves = [] if path is None else [Checkpoint(path, every_steps=every_steps)]
    callbacks = [stop, KeepBest(), *saves]
    result = METHODS[method](model, rounds(), config, validation=rounds(1), callbacks=callbacks)
    return model.state_dict(), result


def test_short_epochs_are_saved_now_and_then(tmp_path, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("metalora.meta.checkpoint.time.monotonic", lambda: next(clock))
    saved, save = [], Checkpoint._save
    monkeypatch.setattr(
        Checkpoint, "_save", lambda self, t: (saved.append(t.next_epoch), save(self, t))
    )
    often, seldom = Checkpoint(tmp_path / "a"), Checkpoint(tmp_path / "b", min_seconds=3)
    for checkpoint, epochs in ((often, [0, 1, 2, 3, 4, 5]), (seldom, [3])):
        saved.clear()
        config = TrainConfig(epochs=5, lr=0.1)
        METHODS["standard"](network(), rounds(), config, callbacks=[checkpoint])
        assert saved == epochs
    with pytest.raises(ValueError, match="Checkpoint: min_seconds must be a finite number >= 0"):
        Checkpoint(tmp_path / "c", min_seconds=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"step_per": "task", "optimizer": "adamw", "weight_decay": 0.1},
        {"precision": "fp16", "schedule": "linear", "schedule_unit": "step", "warmup": 0.3},
        {"optimizer": "sgd", "precision": "bf16", "grad_clip": 0.1, "schedule": "cosine"},
        {"optimizer": "sgd", "momentum": 0.9, "step_per": "task"},
        {"betas": (0.8, 0.95), "eps": 1e-6},
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


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"step_per": "task", "precision": "fp16"}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_resumed_within_an_epoch_equals_uninterrupted(method, fields, tmp_path):
    config = TrainConfig(**{"epochs": 3, "lr": 0.03, "seed": 7, "schedule": "cosine", **fields})
    want, whole = run(method, config)
    path = tmp_path / "run.safetensors"
    inside = 0
    for step in (2, 3, 6):
        with pytest.raises(KeyboardInterrupt):
            run(method, config, path, interrupt=step, every_steps=1)
        inside += read(path)[1]["steps_in_epoch"] > 0
        torch.manual_seed(step)
    got, resumed = run(method, config, path, every_steps=1)
    assert inside
    assert resumed.history == whole.history
    assert all(torch.equal(value, want[name]) for name, value in got.items())


@pytest.mark.parametrize(
    ("number", "lacking"), [(2, ("steps_in_epoch", "shards", "stopping")), (3, ("stopping",))]
)
def test_a_file_of_an_earlier_format_is_read(number, lacking, tmp_path):
    path, config = tmp_path / "run.safetensors", TrainConfig(epochs=3, lr=0.03)
    want, whole = run("lora-ml", config)
    with pytest.raises(KeyboardInterrupt):
        run("lora-ml", config, path, interrupt=8)
    tensors, values = read(path)
    for key in lacking:
        del values[key]
    forge(path, tensors, json.dumps({**values, "format": f"metalora training {number}"}))
    got, resumed = run("lora-ml", config, path)
    assert resumed.history == whole.history
    assert all(torch.equal(got[name], want[name]) for name in want)


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
        (
            "standard",
            {"lr": 0.04},
            8,
            "does not fit the training: lr 0.03, here 0.04; name another path, or delete the file",
        ),
        ("standard", {"epochs": 4}, 8, "epochs 3, here 4"),
        (
            "standard",
            {"lr": 0.04, "epochs": 4, "seed": 1, "weight_decay": 0.5},
            8,
            "and 1 more; name another path",
        ),
        ("standard", {"seed": 1}, 8, "seed 0, here 1"),
        ("reptile", {}, 8, "step 'GradientStep', here 'ReptileStep'"),
        ("lora-ml", {}, 8, "does not fit the model: 0.lora_A 'absent', here 'torch.float32 [2"),
        ("standard", {}, 9, "0.weight 'torch.float32 [8, 6]', here 'torch.float32 [9, 6]'"),
    ],
)
def test_another_trainings_file_is_refused(saved, method, fields, width, message):
    config = TrainConfig(**{"epochs": 3, "lr": 0.03, **fields})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        run(method, config, saved, model=network(width))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner_lr": 0.5}, "inner_lr 0.01, here 0.5"),
        ({"outer_sign": "away"}, "outer_sign 'towards', here 'away'"),
        ({"inner_optimizer": "adam"}, "inner_optimizer 'sgd', here 'adam'"),
        ({"average": True}, "average False, here True"),
        ({"inner_steps": 1}, "inner_steps 20, here 1"),
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
    with pytest.raises(CheckpointError, match="pooled False, here True"):
        standard(network(), rounds(order="pooled"), CONFIG, callbacks=[Checkpoint(path)])


@pytest.mark.parametrize("change", [{"alpha": 3}, {"dropout": 0.0}])
def test_other_adapters_are_refused_even_of_the_same_shapes(change, tmp_path):
    path = tmp_path / "run.safetensors"
    lora_ml(network(), rounds(), CONFIG, LORA, callbacks=[Checkpoint(path)])
    other = replace(LORA, **change)
    with pytest.raises(CheckpointError, match="does not fit the adapters: 0 'MultiTaskLoRAL"):
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


@pytest.mark.parametrize(
    "text", ["[1]", "3", "null", '{"format": "metalora training 1"}', '{"format": [1]}', "{}"]
)
def test_another_format_is_refused(saved, text):
    forge(saved, {}, text)
    with pytest.raises(CheckpointError, match="must have the format 'metalora training 4', got"):
        read(saved)


def forge(path, tensors, text):
    """A file with a valid checksum."""
    digest = _digest(tensors, text)
    save_file(tensors, path, metadata={"metalora": text, "sha256": digest})


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "nonsense", "1" * 5000, ""])
def test_what_is_no_json_is_refused(saved, text):
    forge(saved, {}, text)
    with pytest.raises(CheckpointError, match="is damaged or no checkpoint: ") as caught:
        read(saved)
    assert len(str(caught.value)) < len(str(saved)) + 300 and "\n" not in str(caught.value)


def test_senseless_numbers_are_refused(saved):
    tensors, values = read(saved)
    record = values["history"][0]
    for change, message in (
        ({"next_epoch": 4}, "next_epoch cannot be 4"),
        ({"next_epoch": -1}, "next_epoch cannot be -1"),
        ({"next_epoch": True}, "must hold 'next_epoch', a int, got True"),
        ({"next_epoch": float("nan")}, "must hold 'next_epoch', a int, got nan"),
        ({"steps_done": 10**400}, "steps_done cannot be 10000"),
        ({"steps_in_epoch": 5}, "steps_in_epoch cannot be 5"),
        ({"steps_in_epoch": 2}, "losses cannot be [0]"),
        ({"kept_epoch": 9}, "kept_epoch cannot be 9"),
        ({"history": []}, "history cannot be []"),
        ({"history": [3]}, "history cannot be 3"),
        ({"history": [{**record, "epoch": 1}]}, "history cannot be {"),
        ({"history": [{**record, "loss": "low"}]}, "history cannot be {"),
        ({"history": [{**record, "validation": [1]}]}, "history cannot be {"),
        ({"history": [{"epoch": 0, "loss": 1.0, "lr": 1.0}]}, "history cannot be {"),
        ({"scaler": {"scale": 1.0}}, "does not fit the gradient scaler: scale 1.0, here 'absent'"),
    ):
        refused(saved, tensors, {**values, **change}, message)
    for name, state in (
        ("0.exp_avg", torch.zeros(())),
        ("0.exp_avg", torch.zeros(8, 7)),
        ("0.exp_avg", torch.zeros(8, 6, dtype=torch.int64)),
        ("0.step", torch.tensor(float("nan"))),
        ("0.step", torch.tensor(-1.0)),
        ("0.step", torch.zeros(2)),
        ("0.max_exp_avg", torch.zeros(8, 6)),
    ):
        strange = {**tensors, f"optimizer.{name}": state}
        refused(saved, strange, values, f"has optimizer state {name!r}: torch.")
    missing = {k: v for k, v in tensors.items() if k != "optimizer.0.exp_avg_sq"}
    refused(saved, missing, values, "has optimizer state '0.exp_avg_sq': nothing, wanted step, ")
    for best in ({"best": "high", "epoch": 0}, {"best": 0.5, "epoch": 1.5}, {"best": 0.5}):
        other = [
            {**c, "values": best} if c["kind"] == "KeepBest" else c for c in values["callbacks"]
        ]
        refused(saved, tensors, {**values, "callbacks": other}, "does not fit KeepBest: ")
    for part in ("training", "layers"):
        strange = {**values, part: {**values[part], "\n" * 9999: "\n"}}
        refused(saved, tensors, strange, "\\n '\\n', here 'absent'")
    refused(
        saved, {**tensors, "optimizer.\n.x": torch.zeros(1)}, values, "state '\\n.x', but there"
    )
    smaller = {**tensors, "callback.1.0.weight": torch.zeros(2, 2)}
    refused(saved, smaller, values, "does not fit KeepBest: the weights of the best epoch must be")


@pytest.mark.slow
def test_forged_files_end_in_an_error_or_a_training(tmp_path):
    """Each with a valid checksum; what is accepted must be trained to its end."""
    path = tmp_path / "run.safetensors"
    config = TrainConfig(epochs=2, lr=0.03, precision="fp16")
    with pytest.raises(KeyboardInterrupt):
        run("last-layer-ml", config, path, interrupt=6)
    tensors, values = read(path)
    choose = random.Random(3)
    accepted = 0
    for _ in range(150):
        forged, own = dict(tensors), json.loads(json.dumps(values))
        for _ in range(choose.choice([1, 1, 2])):
            if choose.random() < 0.4:
                spoil_tensors(forged, choose)
            else:
                spoil_values(own, choose)
        forge(path, forged, json.dumps(own))
        model = network()
        before = {k: v.clone() for k, v in model.state_dict().items()}
        error = outcome(config, path, model)
        if isinstance(error, CheckpointError):
            assert "\n" not in str(error)
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        else:
            accepted += 1
    assert 0 < accepted < 75


def outcome(config, path, model):
    """The error that the training ends in; weights that lead to a loss of NaN may be in a file."""
    try:
        run("last-layer-ml", config, path, model=model)
    except (CheckpointError, FloatingPointError) as error:
        return error
    return None


ODD = [None, True, -1, 0, 1.5, math.nan, math.inf, 10**400, "", "é" * 999, [], {}, [[]], {"a": 1}]


def spoil_values(values, choose):
    place = values
    while True:
        keys = [*place] if isinstance(place, dict) else range(len(place))
        key = choose.choice(keys)
        inner = place[key]
        if isinstance(inner, (dict, list)) and inner and choose.random() < 0.8:
            place = inner
            continue
        if choose.random() < 0.3:
            del place[key]
        else:
            place[key] = choose.choice(ODD)
        return


def spoil_tensors(tensors, choose):
    name = choose.choice(sorted(tensors))
    tensor = tensors.pop(name)
    changed = choose.randrange(6)
    if changed == 0:
        return
    shapes = [tensor, tensor[..., None].clone(), tensor.flatten()[:0], tensor.to(torch.complex64)]
    if changed < 5:
        tensors[name] = choose.choice(shapes[1:]) if changed < 4 else tensor.to(torch.int16)
    else:
        tensors[choose.choice(["x", name + ".x", "optimizer.٣.step", "callback.9.a"])] = tensor


def refused(path, tensors, values, message):
    write(path, tensors, values)
    model = network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        run("standard", CONFIG, path, model=model)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < len(str(path)) + 700
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
from metalora.meta import Checkpoint
from metalora.meta import KeepBest
METHODS["lora-ml"](network(), rounds(), CONFIG_LONG, validation=rounds(1),
                   callbacks=[KeepBest(), Checkpoint(Path({path!r}))])
"""
CONFIG_LONG = TrainConfig(epochs=40, lr=0.03)


@pytest.mark.slow
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


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_model_of_another_memory_format_goes_on_in_the_same_bits(optimizer, tmp_path):
    """The file keeps no strides, by which fused optimisers step."""
    config = TrainConfig(epochs=3, lr=0.01, optimizer=optimizer)
    inputs = torch.randn(12, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    data = RoundLoader(inputs, torch.arange(12) % 2, torch.arange(12) // 6, batch_size=3)
    found = []
    for stops in [()], [(2,), ()]:
        for stop in stops:
            torch.manual_seed(1)
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(36, 2))
            model.to(memory_format=torch.channels_last)
            path = tmp_path / str(len(stops))
            callbacks = [Interrupt(*stop) if stop else Nothing(0), Checkpoint(path, every_steps=1)]
            try:
                standard(model, data, config, callbacks=callbacks)
            except KeyboardInterrupt:
                continue
        found.append([p.detach() for p in model.parameters()])
    for uninterrupted, resumed in zip(*found, strict=True):
        assert resumed.stride() == uninterrupted.stride()
        assert torch.equal(resumed, uninterrupted)


def test_what_a_file_holds_is_returned(tmp_path):
    path, shared = tmp_path / "file", torch.arange(6.0)
    data = write(path, {"a": shared, "b": shared.view(2, 3).T}, {"n": 1})
    assert path.read_bytes() == data
    assert torch.equal(read(path, data)[0]["b"], shared.view(2, 3).T)
