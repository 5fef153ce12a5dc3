"""A checkpoint belongs to one training; another that finds it is refused."""

import json
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora._files import partial_beside
from metalora.adapters import LoRAConfig
from metalora.meta import (
    Checkpoint,
    CheckpointError,
    RoundLoader,
    TrainConfig,
    by_task,
    cross_entropy,
    finetune_lora,
    last_layer_ml,
    lora_ml,
    standard,
)
from metalora.meta.checkpoint import read, write
from metalora.meta.identity import SAMPLE_BYTES, digest_of_data, digest_of_tensors, qualified_name

ROOT = Path(__file__).resolve().parents[2]
CONFIG = TrainConfig(epochs=2, lr=0.03)
LORA = LoRAConfig(rank=2)
HINT = "; name another path, or delete the file"


def loader(seed=0, ids=None, flip=False, **options):
    inputs = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    targets = (inputs[:, 0] > 0).long()
    ids = torch.arange(40) % 3 if ids is None else ids
    return RoundLoader(
        inputs, 1 - targets if flip else targets, ids, **{"batch_size": 5, **options}
    )


def network(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 2))


def other_loss(outputs, batch):
    return F.cross_entropy(outputs, batch.targets, reduction="none", label_smoothing=0.5)


def smooth(outputs, batch, by):
    return F.cross_entropy(outputs, batch.targets, reduction="none", label_smoothing=by)


def flip_sign(inputs, generator):
    return -inputs


def one_pass(batch):
    yield batch


def scale(inputs, generator, by):
    return inputs * by


@dataclass(frozen=True)
class Width:
    """A collate that is a frozen dataclass."""

    images: int

    def __call__(self, batch):
        yield batch


def other_forward(model, inputs):
    return model(inputs)


class Collate:
    """A collate that says what it is."""

    def __init__(self, width):
        self.width = width

    def __call__(self, batch):
        yield batch

    def identity(self):
        return {"width": self.width}


def start(path, rounds=None, model=None, config=CONFIG, **options):
    model = network() if model is None else model
    return lora_ml(
        model, loader() if rounds is None else rounds, config, LORA, callbacks=[Checkpoint(path)],
        **options,
    )  # fmt: skip


def test_the_arguments_of_a_loss_must_be_the_same(tmp_path):
    path = tmp_path / "run.safetensors"
    start(path, loss=partial(smooth, by=0.1))
    with pytest.raises(CheckpointError, match=r"loss\.by '0\.1', here '0\.4'"):
        start(path, loss=partial(smooth, by=0.4))
    start(path, loss=partial(smooth, by=0.1))


def test_modules_without_weights_must_be_the_same(tmp_path):
    path, other = tmp_path / "run.safetensors", network()
    start(path)
    other[2] = nn.ReLU()
    with pytest.raises(CheckpointError, match="does not fit the training: modules '"):
        start(path, model=other)


ROTATED = torch.arange(40).roll(1) % 3


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ({}, {"seed": 5}, "rounds.inputs '"),
        ({}, {"flip": True}, "rounds.targets '"),
        ({}, {"ids": ROTATED}, "rounds.task_ids '"),
        ({"batch_size": 8}, {"batch_size": 9}, "rounds.batch_size 8, here 9" + HINT),
        ({"seed": 0}, {"shuffle": False}, "rounds.shuffle True, here False" + HINT),
        ({"max_rounds": 3}, {"max_rounds": 2}, "rounds.max_rounds 3, here 2"),
        ({}, {"transform": flip_sign}, "rounds.transform None, here 'test"),
        ({}, {"collate": one_pass}, "rounds.collate None, here 'test"),
        ({"collate": Collate(1)}, {"collate": Collate(2)}, "rounds.collate.width 1, here 2" + HINT),
        (
            {"transform": partial(scale, by=1.5)},
            {"transform": partial(scale, by=2.5)},
            "rounds.transform.by '1.5', here '2.5'" + HINT,
        ),
        ({"collate": Width(1)}, {"collate": Width(2)}, "rounds.collate.images 1, here 2" + HINT),
    ],
)
def test_another_loader_is_refused_by_what_differs(first, then, message, tmp_path):
    path = tmp_path / "run.safetensors"
    start(path, loader(**first))
    with pytest.raises(CheckpointError) as caught:
        start(path, loader(**then))
    start_of_message = f"Checkpoint: {path} does not fit the training: {message}"
    assert str(caught.value).startswith(start_of_message), str(caught.value)
    assert str(caught.value).endswith(HINT) and "\n" not in str(caught.value)
    start(path, loader(**first))


def test_the_seed_of_the_loader_must_be_the_same(tmp_path):
    path, data = tmp_path / "run.safetensors", loader()
    for seed in (3, 4):
        rounds = RoundLoader(data.inputs, data.targets, data.task_ids, batch_size=5, seed=seed)
        if seed == 3:
            start(path, rounds)
            continue
        with pytest.raises(CheckpointError, match=f"training: rounds.seed 3, here 4{HINT}"):
            start(path, rounds)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": other_loss}, "training: loss 'metalora.meta.steps.cross_entropy', here 'test"),
        (
            {"forward": other_forward},
            "training: forward 'metalora.meta.steps.call_model', here 'te",
        ),
        ({"validation": loader(9)}, "training: validation None, here {'"),
        ({"rounds": by_task(loader())}, "training: rounds.kind 'metalora.meta.data.RoundLoader', "),
        ({"model": network(2)}, "training: initial_weights '"),
    ],
)
def test_another_training_of_the_same_data_is_refused(options, message, tmp_path):
    path = tmp_path / "run.safetensors"
    start(path)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        start(path, **options)


def test_another_validation_set_is_refused(tmp_path):
    path = tmp_path / "run.safetensors"
    start(path, validation=loader(9))
    with pytest.raises(CheckpointError, match=r"training: validation\.inputs '"):
        start(path, validation=loader(8))


def test_a_file_made_for_one_model_never_replaces_anothers_weights(tmp_path):
    path = tmp_path / "run.safetensors"
    finetune_lora(network(1), loader(), CONFIG, LORA, callbacks=[Checkpoint(path)])
    model = network(2)
    before, modules = state_of(model), list(model.modules())
    with pytest.raises(CheckpointError, match="training: initial_weights '"):
        finetune_lora(model, loader(), CONFIG, LORA, callbacks=[Checkpoint(path)])
    assert_state(model, before)
    assert list(model.modules()) == modules  # not adapted, so that the next call can adapt it
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", ["1.running_mean", "3.bias"])
def test_buffers_and_heads_are_compared_too(name, tmp_path):
    path = tmp_path / "run.safetensors"
    options = {"heads": ["3"], "callbacks": [Checkpoint(path)]}
    last_layer_ml(network(), loader(), CONFIG, **options)
    model = network()
    model.state_dict()[name].add_(1)
    before = state_of(model)
    with pytest.raises(CheckpointError, match=r"training: initial_(weights|adapters) '"):
        last_layer_ml(model, loader(), CONFIG, **options)
    assert_state(model, before)


def test_other_frozen_parameters_are_another_training(tmp_path):
    path = tmp_path / "run.safetensors"
    standard(network(), loader(), CONFIG, callbacks=[Checkpoint(path)])
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"training: trained '6 parameters .*', here '4 para"):
        standard(model, loader(), CONFIG, callbacks=[Checkpoint(path)])


def test_a_refused_resume_leaves_the_model_bit_by_bit(tmp_path):
    path = tmp_path / "run.safetensors"
    path.write_bytes(b"damaged")
    for seed in range(20):  # the mean of three equal heads, naively taken, is rounded
        model = network(seed)
        before = state_of(model)
        with pytest.raises(CheckpointError, match="is damaged"):
            last_layer_ml(model, loader(), CONFIG, ["3"], callbacks=[Checkpoint(path)])
        assert_state(model, before)


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_state(model, before):
    assert model.state_dict().keys() == before.keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_on_another_device_drawn_adapters_are_not_compared(tmp_path):
    """A finished training of a GPU can be read without one."""
    path = tmp_path / "run.safetensors"
    start(path)
    tensors, values = read(path)
    values["training"].update(device="cuda", initial_adapters="drawn there")
    write(path, tensors, values)
    assert len(start(path).history) == 2
    values["training"]["initial_weights"] = "others"
    write(path, tensors, values)
    with pytest.raises(CheckpointError, match="training: initial_weights 'others'"):
        start(path)


class OwnRounds:
    """A loader of the user's, which does not say what it is."""

    num_tasks, pooled = 3, False

    def __init__(self):
        self.rounds = loader()

    rounds_per_task = property(lambda self: self.rounds.rounds_per_task)

    def set_epoch(self, epoch):
        self.rounds.set_epoch(epoch)

    def __len__(self):
        return len(self.rounds)

    def __iter__(self):
        return iter(self.rounds)


class SayingRounds(OwnRounds):
    text = "one"

    def identity(self):
        return {"text": self.text, "sizes": (1, 2)}


def test_a_loader_without_identity_is_said_not_to_be_compared(tmp_path):
    path = tmp_path / "run.safetensors"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(path, OwnRounds())
    with pytest.warns(UserWarning, match=r"without comparing the data, for .*OwnRounds has no id"):
        start(path, OwnRounds())
    with pytest.raises(CheckpointError, match=r"training: rounds '.*OwnRounds', here \{'"):
        start(path, loader())


def test_a_loader_may_say_what_it_is(tmp_path):
    path = tmp_path / "run.safetensors"
    start(path, SayingRounds())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start(path, SayingRounds())
    other = SayingRounds()
    other.text = "two"
    with pytest.raises(CheckpointError, match=f"training: rounds.text 'one', here 'two'{HINT}"):
        start(path, other)
    other.text = object()
    with pytest.raises(TypeError, match=r"Checkpoint: identity\(\) must return what JSON can hold"):
        start(path, other)


def test_the_file_is_there_before_the_first_epoch(tmp_path):
    """So a path that cannot be written is known at once, and a log knows where it began."""
    place = tmp_path / "file"
    place.write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        start(place / "run.safetensors")
    path = tmp_path / "run.safetensors"

    def look(model, inputs):
        assert path.exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start(path, forward=look)
    assert read(path)[1]["next_epoch"] == 0
    with pytest.raises(CheckpointError, match="training: forward"):
        start(path)


@pytest.mark.slow
def test_what_a_killed_save_left_is_removed_even_if_nothing_is_saved(tmp_path):
    path = tmp_path / "run.safetensors"
    start(path)
    code = "import sys; from pathlib import Path; from metalora._files import partial_beside; "
    code += "partial_beside(Path(sys.argv[1])).write_bytes(b'part')"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, cwd=ROOT)
    ours = partial_beside(path)
    ours.write_bytes(b"of a process that runs")
    assert len(list(tmp_path.iterdir())) == 3
    start(path)
    assert sorted(tmp_path.iterdir()) == sorted([path, ours])


CUT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import torch
from torch import nn
from test_checkpoint_identity import loader
from metalora.meta import Checkpoint
from metalora.meta import Callback, KeepBest, TrainConfig, standard

path = Path(sys.argv[1])

class Meddle(Callback):
    first = True
    def on_step(self, training, loss):
        if training.next_epoch == 1 and self.first:
            raise KeyboardInterrupt
        if training.next_epoch == 1:
            path.write_bytes(b"")

def train(*callbacks):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3000), nn.Linear(3000, 2))
    callbacks = [KeepBest(), *callbacks]
    config = TrainConfig(epochs=3, lr=1e-3)
    standard(model, loader(), config, validation=loader(1), callbacks=callbacks)
    return model

try:
    train(Meddle(), Checkpoint(path))
except KeyboardInterrupt:
    Meddle.first = False
pairs = zip(train(Meddle(), Checkpoint(path)).parameters(), train().parameters())
sys.exit(0 if all(torch.equal(a, b) for a, b in pairs) else 3)
"""


@pytest.mark.slow
def test_a_file_cut_short_while_the_training_runs_does_no_harm(tmp_path):
    """Memory mapped from the file would end the process."""
    arguments = [str(tmp_path / "run.safetensors"), str(Path(__file__).parent)]
    done = subprocess.run(
        [sys.executable, "-c", CUT, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr)


def test_the_digest_is_quick_and_reads_a_sample_of_large_data(tmp_path):
    data = torch.zeros(SAMPLE_BYTES // 100, 300, dtype=torch.uint8)
    digest = digest_of_data(data)
    assert digest.endswith(f" of {list(data.shape)}")
    for row in (0, len(data) - 1):
        changed = data.clone()
        changed[row, 7] = 1
        assert digest_of_data(changed) != digest
    assert digest_of_data(data.T) != digest and digest_of_data(data.int()) != digest
    started = time.process_time()
    digest_of_data(data)
    whole = time.process_time() - started
    assert whole < 0.5


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64])
def test_every_bit_of_small_data_counts(dtype):
    values = torch.zeros(3, 5, dtype=dtype)
    digests = {digest_of_data(values)}
    for place in range(values.numel()):
        changed = values.clone()
        changed.view(-1)[place] = 1
        digests.add(digest_of_data(changed))
    assert len(digests) == 16
    assert digest_of_data(values.T.contiguous().T) in digests  # strides do not matter
    assert digest_of_data({"a": values}) != digest_of_data({"b": values})
    assert digest_of_tensors({"a": values[0], "b": values}) == digest_of_tensors(
        {"b": values, "a": values[0]}
    )
    assert digest_of_data(torch.zeros(())[None][:0]).endswith(" of [0]")


def test_names_of_functions():
    assert qualified_name(None) is None
    assert qualified_name(cross_entropy) == "metalora.meta.steps.cross_entropy"
    assert qualified_name(partial(partial(cross_entropy), 3)) == qualified_name(cross_entropy)
    assert qualified_name(Collate(1)) == qualified_name(Collate) == f"{__name__}.Collate"
    assert qualified_name(Collate(1).identity) == f"{__name__}.Collate.identity"
    spawned = type("Loss", (), {"__module__": "__mp_main__"})
    assert qualified_name(spawned) == "__main__.Loss"
    assert json.dumps(loader(collate=partial(one_pass)).identity())
