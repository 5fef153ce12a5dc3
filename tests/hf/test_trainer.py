"""A stock transformers.Trainer with an adapted model."""

import copy

import pytest
import torch
from torch import nn

from metalora import TaskOptimizer
from metalora.adapters import LoRAConfig, adapt, unload
from metalora.hf import RoundsCallback, TaskCollator, TaskRounds, accept_task_ids
from metalora.meta import Batch, GradientStep, TrainConfig, evaluate
from metalora.nn import current_tasks, tasks

transformers = pytest.importorskip("transformers", reason="needs the package transformers")
pytest.importorskip("accelerate", reason="needs the package accelerate")

from tests.hf.tiny import (  # noqa: E402
    T,
    adapted_model,
    features,
    pad,
    plain_model,
    state_of_task,
)
from tests.meta.given import GivenRounds  # noqa: E402

DATA = features()
IDS = [feature["task_id"] for feature in DATA]


def optimizer_for(model):
    return TaskOptimizer(model, torch.optim.AdamW, lr=1e-2, weight_decay=0.0)


def trainer(model, folder, *, batch_size=2, data=None, callbacks=(), **options):
    accepted = accept_task_ids(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        **{
            "per_device_train_batch_size": 1,
            "num_train_epochs": 2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "remove_unused_columns": False,
            "label_names": ["labels", "task_ids"],
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": not torch.cuda.is_available(),
            **options,
        },
    )
    return transformers.Trainer(
        model,
        arguments,
        data_collator=TaskCollator(pad),
        train_dataset=TaskRounds(DATA, IDS, batch_size=batch_size, seed=5),
        eval_dataset=data or features(10, seed=2),
        compute_loss_func=accepted.loss,
        compute_metrics=accuracy_of_tasks,
        callbacks=[RoundsCallback(), *callbacks],
        optimizers=(optimizer_for(model), None),
    )


def accuracy_of_tasks(prediction):
    labels, ids = prediction.label_ids
    right = prediction.predictions.argmax(-1) == labels
    return {f"accuracy_{task}": right[ids == task].mean() for task in range(T)}


def as_batch(batch):
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return Batch(inputs, batch["labels"], batch["task_ids"], batch["task_counts"])


def own_loop(model, batches, **fields):
    config = TrainConfig(epochs=1, lr=1e-2, optimizer="adamw", **fields)
    step = GradientStep(model.train(), GivenRounds(batches, T), config)
    return [float(step([batch])) for batch in batches]


def assert_same(model, other):
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            value.cpu(), other.state_dict()[name], rtol=0, atol=1e-10, msg=name
        )


class Seen:
    """A collator that remembers the batches it made."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, items):
        self.batches.append(self.collator(items))
        return self.batches[-1]


def test_training_equals_the_own_loop(tmp_path):
    model, other = adapted_model(), adapted_model()
    made = trainer(model, tmp_path, num_train_epochs=1, logging_steps=1)
    made.data_collator = seen = Seen(made.data_collator)
    made.train()
    assert current_tasks() is None
    batches = [as_batch(batch) for batch in seen.batches]
    assert {batch.counts for batch in batches} >= {(2, 2, 2)}
    assert len({batch.counts for batch in batches}) > 1  # tasks of unequal size
    losses = own_loop(other, batches)
    logged = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, abs=1e-4)  # the trainer rounds what it logs
    assert_same(model, other)


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(tmp_path):
    want = adapted_model()
    trainer(want, tmp_path).train()
    for reentrant in (True, False):
        model = adapted_model()
        trainer(
            model,
            tmp_path,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        ).train()
        assert model.is_gradient_checkpointing
        assert_same(model, want)


def test_accumulated_rounds_are_averaged(tmp_path):
    model, other = adapted_model(), adapted_model()
    made = trainer(model, tmp_path, num_train_epochs=1, gradient_accumulation_steps=2, max_steps=1)
    made.data_collator = seen = Seen(made.data_collator)
    made.train()
    accepted = accept_task_ids(other)
    optimizer = optimizer_for(other)
    total = sum(len(batch["labels"]) for batch in seen.batches[:2])
    for batch in seen.batches[:2]:
        labels = batch.pop("labels")
        losses = nn.functional.cross_entropy(other(**batch).logits, labels, reduction="none")
        (accepted.mean(losses) * len(labels) / total).backward()
    optimizer.step()
    assert_same(model, other)


class StateOfTasks(transformers.TrainerCallback):
    """After each step what every task has: adapters, moments, step counts."""

    def __init__(self, model, optimizer):
        self.model, self.optimizer, self.states = model, optimizer, []

    def on_step_end(self, args, state, control, **kwargs):
        self.states.append([state_of_task(self.model, self.optimizer, t) for t in range(T)])


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_absent_tasks_stay_as_they_are(accumulation, tmp_path):
    """Their adapters, moments and step counts; also over rounds whose gradients are added up."""
    model = adapted_model()
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 3}
    made = trainer(model, tmp_path, batch_size=1, **options)
    made.data_collator = seen = Seen(made.data_collator)
    recorder = StateOfTasks(model, made.optimizer)
    made.add_callback(recorder)
    made.train()
    rounds = len(made.train_dataset)
    sets = [set(batch["task_ids"].tolist()) for batch in seen.batches]
    present = []
    for epoch in range(3):  # an epoch's last step takes the rounds that are left
        of_epoch = sets[epoch * rounds : (epoch + 1) * rounds]
        for start in range(0, rounds, accumulation):
            present.append(set().union(*of_epoch[start : start + accumulation]))
    assert len(present) == len(recorder.states) and any(len(tasks) < T for tasks in present[1:])
    for number in range(1, len(present)):
        before, after = recorder.states[number - 1 : number + 1]
        moved = {
            task
            for task in range(T)
            if not all(torch.equal(a, b) for a, b in zip(before[task], after[task], strict=True))
        }
        assert moved == present[number]


def test_evaluation_and_prediction(tmp_path):
    model = adapted_model()
    data = sorted(features(10, seed=2), key=lambda feature: feature["task_id"])
    made = trainer(model, tmp_path, data=data, per_device_eval_batch_size=4)
    batches = [as_batch(TaskCollator(pad)(data[i : i + 4])) for i in range(0, 10, 4)]
    want = evaluate(model, GivenRounds(batches, T))
    found = made.evaluate()
    assert [found[f"eval_accuracy_{task}"] for task in range(T)] == pytest.approx(want.per_task)
    predictions = made.predict(data)
    with torch.no_grad(), tasks(torch.tensor([f["task_id"] for f in data])):
        batch = pad(data)
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(predictions.predictions), logits)
    assert predictions.label_ids[1].tolist() == [f["task_id"] for f in data]


def test_ungrouped_predictions_are_in_the_order_of_the_dataset(tmp_path):
    model, data = adapted_model(), features(10, seed=2)
    made = trainer(model, tmp_path)
    made.data_collator = TaskCollator(pad, group=False)
    found = made.predict(data)
    assert found.label_ids[1].tolist() == [f["task_id"] for f in data]
    with torch.no_grad(), tasks(torch.tensor([f["task_id"] for f in data])):
        batch = pad(data)
        logits = model.eval()(batch["input_ids"], batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(found.predictions), logits)


@pytest.mark.slow
def test_a_run_goes_on_where_it_stopped(tmp_path):
    whole, stopped, resumed = adapted_model(), adapted_model(), adapted_model()
    rounds = len(TaskRounds(DATA, IDS, batch_size=2))
    steps = rounds + 2  # it stops inside the second epoch
    options = {"save_strategy": "steps", "save_steps": steps, "num_train_epochs": 3}
    trainer(whole, tmp_path / "whole", num_train_epochs=3).train()
    trainer(stopped, tmp_path / "run", callbacks=[StopAfter(steps)], **options).train()
    checkpoint = tmp_path / "run" / f"checkpoint-{steps}"
    assert checkpoint.is_dir()
    trainer(resumed, tmp_path / "run", **options).train(resume_from_checkpoint=str(checkpoint))
    assert_same(resumed, whole)


class StopAfter(transformers.TrainerCallback):
    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.steps


def test_what_is_saved(tmp_path):
    model = adapted_model()
    made = trainer(model, tmp_path)
    made.save_model(tmp_path / "adapted")
    saved = transformers.modeling_utils.load_state_dict(
        str(tmp_path / "adapted" / "model.safetensors")
    )
    assert saved.keys() == model.state_dict().keys()
    unload(model)
    made.save_model(tmp_path / "plain")
    loaded = type(model).from_pretrained(tmp_path / "plain", dtype=torch.float64)
    assert_same(loaded, model)
    assert loaded.state_dict().keys() == plain_model().state_dict().keys()


def test_calls_without_tasks_are_as_before():
    model = adapted_model()
    accepted, batch = accept_task_ids(model), TaskCollator(pad)(DATA[:4])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    want = model(**batch).logits
    with tasks(batch["task_ids"]):
        torch.testing.assert_close(model(**inputs).logits, want)
    with pytest.raises(ValueError, match="the model's latest call was without task_ids"):
        accepted.mean(torch.zeros(4))
    with pytest.raises(ValueError, match="which task does each sample belong to"):
        model(**inputs)
    model(**batch)
    with pytest.raises(ValueError, match=r"latest call's samples, \[4\], got \[3\]"):
        accepted.mean(torch.zeros(3))
    accepted.remove()
    with pytest.raises(ValueError, match="which task does each sample belong to"):
        model(**inputs, task_ids=batch["task_ids"])


def test_accepting_again_takes_the_earlier_objective_off():
    model, batch = adapted_model(), TaskCollator(pad)(DATA[:4])
    accept_task_ids(model)
    twin = copy.deepcopy(model)
    for accepting in (model, twin):
        accepted = accept_task_ids(accepting)
        accepting(**batch)
        assert accepted.mean(torch.ones(4)) == 1
        accepted.remove()
        assert not accepting._forward_pre_hooks and not accepting._forward_hooks


def test_errors_leave_no_tasks_behind():
    model, batch = adapted_model(), TaskCollator(pad)(DATA[:4])
    accept_task_ids(model)
    with pytest.raises(IndexError):
        model(**{**batch, "input_ids": batch["input_ids"] + 50})
    assert current_tasks() is None
    with pytest.raises(
        ValueError, match=r"must sum to the 2 task_ids, .*TaskCollator\(group=False"
    ):
        model(batch["input_ids"][:2], task_ids=torch.tensor([0, 1]), task_counts=(2, 2))
    logits = model(**batch).logits
    model.classifier.dense.weight.register_hook(lambda grad: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits.sum().backward()
    assert model(**batch).logits.shape == logits.shape
    assert current_tasks() is None


def test_a_plain_model_is_refused():
    with pytest.raises(ValueError, match="accept_task_ids: the model has no adapters"):
        accept_task_ids(plain_model())


def next_token_loss(logits, batch):
    labels = batch.targets[:, 1:]
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, labels, reduction="none")
    return losses.sum(1) / labels.ne(-100).sum(1).clamp(min=1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_objective_of_a_decoder_is_what_trainer_reports(accumulate, tmp_path):
    """Trainer counts the labels of a causal model without the first of each sequence."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, initializer_range=0.2,
    )  # fmt: skip
    model = adapt(transformers.LlamaForCausalLM(config), LoRAConfig(rank=2), 2)
    tokens, ids = torch.randint(3, 40, (8, 4)), torch.arange(8) % 2
    data = [
        {"input_ids": x, "labels": x, "task_id": task}
        for x, task in zip(tokens, ids.tolist(), strict=True)
    ]
    accepted = accept_task_ids(model, next_token_loss)
    with tasks(ids):
        losses = next_token_loss(model(input_ids=tokens).logits, Batch(None, tokens, ids))
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=8 // accumulate, max_steps=1,
        gradient_accumulation_steps=accumulate, logging_steps=1, remove_unused_columns=False,
        report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trained = transformers.Trainer(
        model,
        arguments,
        data_collator=TaskCollator(transformers.default_data_collator),
        train_dataset=data,
        compute_loss_func=accepted.loss,
    )
    trained.train()
    assert trained.state.log_history[0]["loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    with pytest.raises(ValueError, match="the batch has no labels; give every sample"):
        accepted.loss(None, None)
