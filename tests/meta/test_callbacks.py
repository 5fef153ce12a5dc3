"""What happens beside the training, and evaluation."""

import copy
import json
import math
import re
import sys

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig
from metalora.meta import (
    Callback,
    Checkpoint,
    EarlyStopping,
    Evaluation,
    KeepBest,
    MetricsLog,
    Progress,
    RoundLoader,
    TrainConfig,
    evaluate,
    finetune_lora,
    lora_ml,
    standard,
)
from metalora.nn import tasks
from tests.meta.given import GivenRounds


def rounds(**options):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(24, 4, generator=generator)
    ids = torch.tensor([0] * 16 + [1] * 8)
    return RoundLoader(inputs, (inputs[:, 0] > 0).long(), ids, **{"batch_size": 4, **options})


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


class Record(Callback):
    """Writes down each call, and the weights of each epoch."""

    def __init__(self):
        self.calls, self.weights = [], []

    def on_start(self, training):
        self.calls.append("start")

    def on_step(self, training, loss):
        assert loss.shape == () and not loss.requires_grad
        self.calls.append("step")

    def on_epoch(self, training, record):
        self.calls.append(("epoch", record["epoch"]))
        self.weights.append({k: v.clone() for k, v in training.model.state_dict().items()})

    def on_end(self, training):
        self.calls.append("end")


def scores(*values):
    left = list(values)
    return lambda model: left.pop(0)


CONFIG = TrainConfig(epochs=4, lr=0.05)


def test_callbacks_are_called_in_turn():
    record = Record()
    standard(network(), rounds(), TrainConfig(epochs=2, lr=0.1), callbacks=[record])
    steps = ["step"] * 4
    assert record.calls == ["start", *steps, ("epoch", 0), *steps, ("epoch", 1), "end"]


def test_the_best_epoch_is_restored_the_first_of_equals():
    model, record = network(), Record()
    result = standard(
        model,
        rounds(),
        CONFIG,
        validation=scores(0.1, 0.7, 0.7, 0.3),
        callbacks=[record, KeepBest()],
    )
    assert (result.kept_epoch, result.best_epoch) == (1, 1)
    assert (result.best_metric, result.last_metric) == (0.7, 0.3)
    for name, value in model.state_dict().items():
        assert torch.equal(value, record.weights[1][name])
        assert not torch.equal(value, record.weights[3][name])


def test_without_it_the_last_epoch_stays():
    model, record = network(), Record()
    result = standard(
        model, rounds(), CONFIG, validation=scores(0.9, 0.2, 0.3, 0.1), callbacks=[record]
    )
    assert (result.kept_epoch, result.best_epoch) == (3, 0)
    assert all(torch.equal(v, record.weights[3][k]) for k, v in model.state_dict().items())
    plain = standard(network(), rounds(), CONFIG)
    assert (plain.kept_epoch, plain.best_epoch, plain.best_metric, plain.last_metric) == (
        3,
        3,
        None,
        None,
    )


class StopOnce(Callback):
    """Stops the first training in its fourth epoch."""

    def on_epoch(self, training, record):
        if record["epoch"] == 3 and not hasattr(self, "stopped"):
            self.stopped = True
            raise KeyboardInterrupt


def test_a_validation_every_few_epochs_and_after_the_last(tmp_path):
    def run(values):
        return standard(
            network(),
            rounds(),
            TrainConfig(epochs=5, lr=0.05),
            validation=scores(*values),
            validate_every=2,
            callbacks=[stop, KeepBest(), Checkpoint(tmp_path / "run")],
        )

    stop = StopOnce()
    with pytest.raises(KeyboardInterrupt):
        run([0.7, 0.9])
    result = run([0.1, 0.3])
    assert {r["epoch"]: r.get("validation") for r in result.history} == {
        0: None,
        1: 0.7,
        2: None,  # the epochs before the interruption end here
        3: 0.1,
        4: 0.3,
    }
    assert (result.kept_epoch, result.best_epoch) == (1, 1)
    assert (result.best_metric, result.last_metric) == (0.7, 0.3)
    with pytest.raises(ValueError, match="train: validate_every must be an int >= 1, got 0"):
        standard(network(), rounds(), CONFIG, validate_every=0)


def test_keeping_the_best_includes_the_adapters():
    record, model = Record(), network()
    result = lora_ml(
        model,
        rounds(),
        CONFIG,
        LoRAConfig(rank=1),
        validation=scores(0.5, 0.1, 0.1, 0.1),
        callbacks=[record, KeepBest()],
    )
    assert torch.equal(result.adapters[1]["0.lora_B"], record.weights[0]["0.lora_B"][1])
    assert torch.equal(model[0].weight, record.weights[0]["0.weight"])


LONG = TrainConfig(epochs=8, lr=0.01)


@pytest.mark.parametrize(
    ("found", "settings", "epochs"),
    [
        ([0.1, 0.3, 0.2, 0.3, 0.9], {"patience": 2}, 4),  # an equal one is no better
        ([0.1, 0.3, 0.2, 0.4, 0.3, 0.2, 0.9], {"patience": 2}, 6),
        ([0.3, 0.2, 0.9], {"patience": 1}, 2),
        ([0.1, 0.2, 0.25, 0.9], {"patience": 1, "min_delta": 0.1}, 2),
        ([math.nan, math.nan, 0.2, math.nan, math.nan, 0.9], {"patience": 2}, 2),
        ([0.1 * i for i in range(8)], {"patience": 1}, 8),
    ],
)
def test_a_training_ends_early(found, settings, epochs):
    record, stop = Record(), EarlyStopping(**settings)
    options = {"validation": scores(*found), "callbacks": [record, stop, KeepBest()]}
    result = standard(network(), rounds(), LONG, **options)
    assert len(result.history) == epochs and record.calls[-1] == "end"
    best = max(range(epochs), key=lambda e: -math.inf if math.isnan(found[e]) else found[e])
    assert (result.kept_epoch, result.best_epoch) == (best, best)


def test_a_training_that_ended_early_is_not_gone_on_with(tmp_path):
    def run(*found):
        callbacks = [stop, EarlyStopping(patience=4), Checkpoint(tmp_path / "run")]
        options = {"validation": scores(*found), "callbacks": callbacks}
        return standard(network(), rounds(), LONG, **options)

    stop = StopOnce()
    with pytest.raises(KeyboardInterrupt):
        run(0.1, 0.3, 0.2, 0.1)  # the last epoch was not saved
    first = run(0.0, 0.2, 0.3)
    found = [record["validation"] for record in first.history]
    assert found == [0.1, 0.3, 0.2, 0.0, 0.2, 0.3]
    assert run().history == first.history


class End(Callback):
    """Ends the training at a step; the first training is interrupted after the next one."""

    def __init__(self, step):
        self.step = step

    def on_step(self, training, loss):
        if training.steps_done == self.step:
            training.stopping = loss < math.inf  # a tensor
        if training.steps_done == self.step + 1 and not hasattr(self, "interrupted"):
            self.interrupted = True
            raise KeyboardInterrupt


@pytest.mark.parametrize(("step", "epochs"), [(2, 1), (5, 2)])
def test_an_epoch_is_finished_before_the_training_ends(step, epochs, tmp_path):
    callbacks = [End(step), Checkpoint(tmp_path / "run", every_steps=1)]
    with pytest.raises(KeyboardInterrupt):
        standard(network(), rounds(), CONFIG, callbacks=callbacks)
    model = network()
    result = standard(model, rounds(), CONFIG, callbacks=callbacks)
    whole = standard(other := network(), rounds(), TrainConfig(epochs=epochs, lr=0.05))
    assert result.history == whole.history
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in model.state_dict().items())


class EndAtOnce(Callback):
    def on_start(self, training):
        training.stopping = True


def test_a_training_may_end_before_it_is_validated():
    options = {"validation": scores(), "validate_every": 3, "callbacks": [EndAtOnce(), KeepBest()]}
    result = standard(network(), rounds(), CONFIG, **options)
    assert len(result.history) == 1 and result.last_metric is None


def test_early_stopping_checks_what_it_is_given():
    with pytest.raises(ValueError, match="EarlyStopping: patience must be an int >= 1, got 0"):
        EarlyStopping(0)
    with pytest.raises(ValueError, match="EarlyStopping: min_delta must be"):
        EarlyStopping(1, min_delta=-0.1)
    with pytest.raises(ValueError, match="EarlyStopping: needs a validation"):
        standard(network(), rounds(), CONFIG, callbacks=[EarlyStopping(1)])


def test_keeping_the_best_needs_a_validation():
    with pytest.raises(ValueError, match="KeepBest: needs a validation"):
        standard(network(), rounds(), CONFIG, callbacks=[KeepBest()])


def test_metrics_are_appended_line_by_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for method in ("a", "b"):
        log = MetricsLog(path, method=method)
        standard(network(), rounds(), CONFIG, validation=rounds(), callbacks=[log])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["method"], line["epoch"]) for line in lines] == [
        (m, e) for m in "ab" for e in range(4)
    ]
    assert set(lines[0]) == {
        "method",
        "epoch",
        "loss",
        "lr",
        "validation",
        "validation_per_task",
    }
    assert len(lines[0]["validation_per_task"]) == 2


class Crash(Callback):
    """Ends the training after the log and before the checkpoint of an epoch."""

    def __init__(self, epoch):
        self.epoch = epoch

    def on_epoch(self, training, record):
        if record["epoch"] == self.epoch:
            raise KeyboardInterrupt


@pytest.mark.parametrize("epochs", [[0], [2], [0, 0, 1, 3]])
def test_a_resumed_training_logs_each_epoch_once(epochs, tmp_path):
    log, path = tmp_path / "metrics.jsonl", tmp_path / "run.safetensors"
    other = MetricsLog(log, method="b", seeds=[1, 2])
    standard(network(), rounds(), CONFIG, callbacks=[other])
    standard(network(), rounds(), CONFIG, callbacks=[MetricsLog(log, method="a", seeds=[1, 2])])

    def train(crash):
        ours = MetricsLog(log, method="a", seeds=(1, 2))
        standard(network(), rounds(), CONFIG, callbacks=[ours, Crash(crash), Checkpoint(path)])

    for epoch in epochs:
        with pytest.raises(KeyboardInterrupt):
            train(epoch)
        with log.open("a") as file:  # another training's line, and one that was being written
            file.write(json.dumps({"method": "b", "epoch": 9}) + '\n{"method": "a", "ep')
    train(-1)
    train(-1)  # there is nothing left to do
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    of_others = [("b", e) for e in range(4)] + [("a", e) for e in range(4)]
    found = [(line["method"], line["epoch"]) for line in lines]
    assert found[:8] == of_others
    assert [f for f in found[8:] if f[0] == "a"] == [("a", e) for e in range(4)]
    assert found[8:].count(("b", 9)) == len(epochs)
    assert lines[4:8] == [line for line in lines[8:] if line["method"] == "a"]


@pytest.mark.parametrize(
    ("end", "kept"), [('{"epoch": 7}', '{"epoch": 7}\n'), ('{"epoch": 7, "lo', ""), ("", "")]
)
def test_a_log_goes_on_in_a_line_of_its_own(end, kept, tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"epoch": 3}\nnot ours\n' + end)
    standard(network(), rounds(), TrainConfig(epochs=1, lr=0.05), callbacks=[MetricsLog(log)])
    text = log.read_text()
    assert text.startswith('{"epoch": 3}\nnot ours\n' + kept + '{"epoch": 0, "loss"')
    assert text.count("\n") == 3 + kept.count("\n") and text.endswith("}\n")


def test_progress_is_silent_without_a_terminal(capsys):
    standard(network(), rounds(), CONFIG, callbacks=[Progress()])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_on_a_terminal_shows_loss_and_validation(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    standard(network(), rounds(), CONFIG, validation=rounds(), callbacks=[Progress("standard")])
    shown = capsys.readouterr().err
    assert "standard" in shown and "loss=" in shown and "validation=" in shown


def test_without_tqdm_there_is_no_progress_and_no_error(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    standard(network(), rounds(), CONFIG, validation=rounds(), callbacks=[Progress()])
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_a_function_validates_in_evaluation_mode():
    """And may train a copy of the model."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
    x, found = torch.randn(20, 4), []

    def validation(model):
        found.append((model(x), model(x)))
        copied = copy.deepcopy(model)
        standard(copied, rounds(), TrainConfig(epochs=1, lr=0.1))
        assert not any(module.training for module in model.modules())
        return 1

    statistics = []
    for watched in (validation, None):
        torch.manual_seed(0)
        trained = copy.deepcopy(model)
        standard(trained, rounds(), TrainConfig(epochs=2, lr=0.1), validation=watched)
        assert trained.training
        statistics.append(trained.state_dict())
    assert len(found) == 2 and all(torch.equal(*pair) for pair in found)
    assert all(torch.equal(value, statistics[1][name]) for name, value in statistics[0].items())
    with pytest.raises(TypeError, match=r"validation must return a number, .* got NoneType"):
        standard(model, rounds(), TrainConfig(epochs=1, lr=0.1), validation=lambda model: None)


def test_validation_may_return_an_evaluation():
    result = standard(
        network(), rounds(), CONFIG, validation=lambda model: Evaluation((0.2, 0.4), 0.3)
    )
    assert result.history[0]["validation"] == 0.3
    assert result.history[0]["validation_per_task"] == [0.2, 0.4]


def test_learning_rate_is_recorded():
    config = TrainConfig(epochs=4, lr=0.1, schedule="cosine")
    result = standard(network(), rounds(), config)
    want = [0.1 * (1 + math.cos(math.pi * e / 4)) / 2 for e in range(4)]
    assert [record["lr"] for record in result.history] == pytest.approx(want)


def test_evaluation_is_the_mean_over_each_tasks_samples_then_over_tasks():
    model = nn.Sequential(nn.Dropout(0.9), network())
    source = rounds(batch_size=5)
    model.train()
    model[1][0].eval()
    found = evaluate(model, source)
    right = network()(source.inputs).argmax(1) == source.targets
    want = [right[source.task_ids == task].float().mean().item() for task in (0, 1)]
    assert found.per_task == pytest.approx(want)
    assert found.mean == pytest.approx(sum(want) / 2)
    assert model.training and model[0].training and not model[1][0].training
    assert all(p.grad is None for p in model.parameters())


def test_evaluation_runs_each_sample_with_its_own_task():
    model = network()
    finetune_lora(model, rounds(), CONFIG, LoRAConfig(rank=1))
    per_task = evaluate(model, rounds(), lambda outputs, batch: outputs[:, 0]).per_task
    swapped = rounds()
    swapped.task_ids = 1 - swapped.task_ids
    source = RoundLoader(swapped.inputs, swapped.targets, swapped.task_ids, batch_size=4)
    other = evaluate(model, source, lambda outputs, batch: outputs[:, 0]).per_task
    assert per_task[0] != pytest.approx(other[1])


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ((math.nan, 0.2, 0.1, 0.3), 3),
        ((math.nan, -math.inf, math.nan, math.nan), 1),
        ((0.2, math.nan, 0.1, math.nan), 0),
        ((math.nan,) * 4, 0),
    ],
)
def test_a_validation_that_is_nan_is_worse_than_any_other(values, best):
    model, record = network(), Record()
    keep = KeepBest()
    result = standard(model, rounds(), CONFIG, validation=scores(*values), callbacks=[record, keep])
    assert (result.kept_epoch, result.best_epoch) == (best, best)
    assert result.best_metric is result.history[best]["validation"]
    assert all(torch.equal(v, record.weights[best][k]) for k, v in model.state_dict().items())


def test_the_folder_of_the_log_is_made_at_the_start(tmp_path):
    log = tmp_path / "runs" / "one" / "metrics.jsonl"

    class Look(Callback):
        def on_step(self, training, loss):
            assert log.parent.is_dir()

    standard(network(), rounds(), CONFIG, callbacks=[MetricsLog(log), Look()])
    assert len(log.read_text().splitlines()) == 4


class Stops(Callback):
    def __init__(self, calls, name, fails=""):
        self.calls, self.name, self.fails = calls, name, fails

    def _call(self, place):
        self.calls.append(f"{place} {self.name}")
        if place == self.fails:
            raise KeyboardInterrupt(place)

    def on_start(self, training):
        self._call("start")

    def on_step(self, training, loss):
        if training.steps_done == 3:
            self._call("step")

    def on_end(self, training):
        self._call("end")

    def on_stop(self, training):
        self._call("stop")


@pytest.mark.parametrize(
    ("fails", "called"),
    [
        ("", "start a, start b, step a, step b, end a, end b, stop b, stop a"),
        ("start", "start a, stop a"),
        ("step", "start a, start b, step a, stop b, stop a"),
        ("end", "start a, start b, step a, step b, end a, stop b, stop a"),
    ],
)
def test_callbacks_are_stopped_however_a_training_ends(fails, called):
    calls = []
    callbacks = [Stops(calls, "a", fails), Stops(calls, "b")]
    config = TrainConfig(epochs=1, lr=0.05)
    if fails:
        with pytest.raises(KeyboardInterrupt, match=f"^{fails}$") as caught:
            standard(network(), rounds(), config, callbacks=callbacks)
        assert caught.value.__context__ is None
    else:
        standard(network(), rounds(), config, callbacks=callbacks)
    assert ", ".join(calls) == called


def test_the_bar_is_closed_when_a_training_fails(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress()
    with pytest.raises(KeyboardInterrupt):
        standard(network(), rounds(), CONFIG, callbacks=[progress, Crash(1)])
    assert progress._bar.disable, "closed"


def test_an_evaluation_in_which_no_sample_counts_is_nan():
    sizes = torch.zeros(24, dtype=torch.int64)
    found = evaluate(network(), rounds(sizes=sizes))
    assert math.isnan(found.mean) and all(map(math.isnan, found.per_task))


@pytest.mark.parametrize("fails", [False, True])
def test_no_gradients_are_left_on_the_model(fails):
    model = network()
    if fails:
        with pytest.raises(KeyboardInterrupt):
            standard(model, rounds(), CONFIG, callbacks=[Crash(1)])
    else:
        standard(model, rounds(), CONFIG)
    assert [p.grad for p in model.parameters()] == [None] * len(list(model.parameters()))


def test_an_evaluation_of_nothing_is_nan():
    found = evaluate(network(), GivenRounds([], 2))
    assert math.isnan(found.mean) and len(found.per_task) == 2
    assert all(map(math.isnan, found.per_task))


class ReadsWithGradients(Callback):
    """Runs the model on all tasks, as a validation might, and notes which tasks a step moves."""

    def __init__(self):
        self.moved, self.before = [], None

    def on_step(self, training, loss):
        now = training.model[0].lora_B.detach().clone()
        if self.before is not None:
            self.moved.append((now != self.before).flatten(1).any(1).nonzero()[:, 0].tolist())
        self.before = now
        with tasks(torch.tensor([0, 1])):
            training.model(torch.ones(2, 4))


def test_a_callback_that_runs_the_model_moves_no_task():
    reads = ReadsWithGradients()
    lora = LoRAConfig(rank=1, target_modules=["0"])
    config = TrainConfig(epochs=2, lr=0.1)
    source = rounds(order="interleaved", shuffle=False)
    lora_ml(network(), source, config, lora, callbacks=[reads])
    assert reads.moved == [[1], [0], [1], [0], [0], [0], [1], [0], [1], [0], [0]]


class WithExtraState(nn.Linear):
    extra = 0

    def get_extra_state(self):
        return {"extra": self.extra}

    def set_extra_state(self, state):
        self.extra = state["extra"]


def test_extra_state_is_kept_with_the_best_weights_and_refused_in_a_checkpoint(tmp_path):
    model = WithExtraState(4, 2)

    def validation(model):
        model.extra += 1
        return -model.extra

    config = TrainConfig(epochs=3, lr=0.1)
    standard(model, rounds(), config, validation=validation, callbacks=[KeepBest()])
    assert model.extra == 1
    with pytest.raises(ValueError, match=r"state_dict of tensors alone, .*'_extra_state'"):
        standard(model, rounds(), config, callbacks=[Checkpoint(tmp_path / "c.safetensors")])


@pytest.mark.parametrize("shape", [(), (24, 1)])
def test_a_metric_must_measure_each_sample(shape):
    with pytest.raises(
        ValueError, match=rf"one value per sample, \[.*\], got {re.escape(str(list(shape)))}"
    ):
        evaluate(network(), rounds(batch_size=24), lambda outputs, batch: torch.zeros(shape))


class OnlyOnce:
    """A loader that is through after one iteration."""

    def __init__(self, source):
        self.batches = iter(source)
        self.num_tasks, self.pooled, self.length = source.num_tasks, False, len(source)
        self.rounds_per_task = source.rounds_per_task

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return self.length

    def __iter__(self):
        return self.batches


def test_a_loader_that_gives_nothing_is_named():
    with pytest.raises(ValueError, match="gave no batch in epoch 1; it must give its batches anew"):
        standard(network(), OnlyOnce(rounds()), TrainConfig(epochs=2, lr=0.1))
