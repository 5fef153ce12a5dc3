"""PEFT-ML with the layers of the package peft: an adapter per task, one task after the other."""

import copy
import re
import sys

import pytest
import torch
from torch import nn

from metalora.adapters import LoRAConfig, adapt, adapted_layers
from metalora.meta import (
    Batch,
    Callback,
    Checkpoint,
    RoundLoader,
    TrainConfig,
    by_task,
    evaluate,
    finetune_peft,
    lora_ml,
    peft_ml,
)
from metalora.nn import tasks
from tests.meta.given import GivenRounds

peft = pytest.importorskip("peft", reason="needs the package peft")

T = 3
LAYERS = ["body.0", "head"]
DORA = peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True)
METHODS = {
    "dora": DORA,
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["head"]),
    "rslora": peft.LoraConfig(r=2, target_modules=LAYERS, use_rslora=True),
    "rank pattern": peft.LoraConfig(r=2, target_modules=LAYERS, rank_pattern={"head": 1}),
    "loha": peft.LoHaConfig(r=2, target_modules=["body.0"]),
    "lokr": peft.LoKrConfig(r=2, target_modules=["body.0"]),
    "oft": peft.OFTConfig(oft_block_size=4, target_modules=["body.0"]),
    "vera": peft.VeraConfig(r=4, target_modules=["body.0"]),
}


class Network(nn.Module):
    def __init__(self, dropout=0.1):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.body(x))


def network(dropout=0.1):
    torch.manual_seed(0)
    return Network(dropout)


def rounds(count=90, seed=0, **options):
    """Three tasks whose labels follow different directions of the input."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    directions = torch.randn(T, 8, generator=torch.Generator().manual_seed(9))
    ids = torch.arange(count) % T
    targets = ((inputs * directions[ids]).sum(1) > 0).long()
    return RoundLoader(inputs, targets, ids, **{"batch_size": 10, "seed": 1, **options})


def values(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def snapshot(model):
    """All that must be as before when the adapters are out again."""
    flags = [p.requires_grad for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    return (
        str(model),
        [*map(id, model.parameters())],
        [*model.state_dict()],
        flags,
        hooks,
        [*vars(model)],
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_any_method_learns_and_leaves_a_plain_model(method):
    model = network()
    before, start = snapshot(model), values(model)
    source = rounds(60, seed=1, batch_size=20, shuffle=False)
    config = TrainConfig(epochs=10, lr=0.02)
    result = peft_ml(model, rounds(), config, METHODS[method], fused=False, validation=source)
    assert snapshot(model) == before
    assert all(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert result.history[-1]["loss"] < 0.95 * result.history[0]["loss"]
    assert result.best_metric > 0.6
    assert len(result.history[-1]["validation_per_task"]) == T == len(result.adapters)
    assert result.adapters[0].keys() == result.adapters[1].keys()
    assert any(not torch.equal(v, result.adapters[1][k]) for k, v in result.adapters[0].items())


class SetAdapters(Callback):
    """Starts the adapters of both paths from the same values."""

    def __init__(self):
        self.start = adapt(network().double(), LoRAConfig(rank=2, alpha=3, heads=["head"]), T)
        for parameter in self.start.parameters():
            nn.init.normal_(parameter, std=0.3)

    def on_start(self, training):
        wanted = self.start.body[0]
        with torch.no_grad():
            if adapted_layers(training.model):
                training.model.body[0].lora_A.copy_(wanted.lora_A)
                training.model.body[0].lora_B.copy_(wanted.lora_B)
                return
            layer = training.model.base_model.model.body[0]
            for task in range(T):
                layer.lora_A[f"task{task}"].weight.copy_(wanted.lora_A[task])
                layer.lora_B[f"task{task}"].weight.copy_(wanted.lora_B[task])


def ragged(absent=True):
    """Unsorted rounds, of which some lack a task."""
    torch.manual_seed(3)
    ids = [[2, 0, 1, 1, 0, 2, 2], [1, 1, 0, 1] if absent else [1, 2, 0, 1], [0, 2, 1], [2, 0, 2, 1]]
    return GivenRounds(
        [
            Batch(torch.randn(len(i), 8).double(), torch.randint(2, (len(i),)), torch.tensor(i))
            for i in ids
        ],
        T,
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("step_per", ["round", "task"])
def test_one_task_after_the_other_equals_all_at_once(step_per, optimizer):
    config = TrainConfig(
        epochs=2, lr=0.01, weight_decay=0.02, optimizer=optimizer, step_per=step_per, grad_clip=0.5
    )
    adapter = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=["body.0"], modules_to_save=["head"]
    )
    fused, loop = network(0.0).double(), network(0.0).double()
    want = peft_ml(fused, ragged(), config, adapter, callbacks=[SetAdapters()])
    got = peft_ml(loop, ragged(), config, adapter, callbacks=[SetAdapters()], fused=False)
    close = {"rtol": 0, "atol": 1e-12}
    for name, value in fused.state_dict().items():
        torch.testing.assert_close(loop.state_dict()[name], value, **close)
    for task in range(T):
        for name, value in want.adapters[task].items():
            suffix = "" if name.startswith("head") else ".weight"
            found = got.adapters[task][f"base_model.model.{name}{suffix}"]
            torch.testing.assert_close(found, value, **close)
    assert [r["loss"] for r in got.history] == pytest.approx([r["loss"] for r in want.history])


class KeepTask2(Callback):
    """Remembers the parameters of task 2 after every step."""

    def __init__(self):
        self.steps = []

    def on_step(self, training, loss):
        own = {n: p.detach().clone() for n, p in training.model.named_parameters() if "task2" in n}
        self.steps.append(own)


def test_an_absent_task_does_not_move():
    watch = KeepTask2()
    config = TrainConfig(epochs=1, lr=0.05, optimizer="adamw", weight_decay=0.1)
    peft_ml(network().double(), ragged(), config, DORA, callbacks=[watch])
    first, second, third, _ = watch.steps
    assert first
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert not all(torch.equal(value, third[name]) for name, value in second.items())


def test_lora_takes_the_fused_path():
    config, model, plain = TrainConfig(epochs=2, lr=0.02), network(), network()
    lora = peft.LoraConfig(r=2, target_modules=LAYERS)
    result = peft_ml(model, rounds(), config, lora)
    assert result.adapters[0].keys() == lora_ml(plain, rounds(), config, lora).adapters[0].keys()
    assert all(torch.equal(value, plain.state_dict()[k]) for k, value in values(model).items())
    ours = peft_ml(network(), rounds(), config, LoRAConfig(rank=2, target_modules=LAYERS))
    assert ours.adapters[0].keys() == result.adapters[0].keys()
    convolution = nn.Sequential(nn.Conv1d(8, 4, 1), nn.Flatten(), nn.Linear(4, 2))
    other = peft.LoraConfig(r=2, target_modules=["0"])  # metalora adapts linear layers only
    forward = lambda model, x: model(x[:, :, None])  # noqa: E731
    result = peft_ml(convolution, rounds(), config, other, forward=forward)
    assert "base_model.model.0.lora_A.weight" in result.adapters[0]


@pytest.mark.parametrize(("pattern", "fused"), [("1|2", True), ("[0-2]", False), (".*1", True)])
def test_a_pattern_means_what_it_means_to_peft(pattern, fused):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    ids = torch.arange(12) % T
    source = RoundLoader(torch.randint(8, (12,)), torch.randint(2, (12,)), ids, batch_size=4)
    adapter = peft.LoraConfig(r=2, target_modules=pattern)
    (state, *_) = peft_ml(model, source, TrainConfig(epochs=1, lr=0.02), adapter).adapters
    assert ("base_model.model.0.lora_embedding_A" in state) == (not fused)
    assert ("1.lora_A" in state) == fused


def test_heads_of_the_tasks_are_averaged():
    model = network()
    weight = model.head.weight
    config = peft.IA3Config(
        target_modules=["body.0"], feedforward_modules=[], modules_to_save=["head"]
    )
    result = peft_ml(model, rounds(), TrainConfig(epochs=1, lr=0.02), config)
    heads = torch.stack([state["base_model.model.head.weight"] for state in result.adapters])
    assert not torch.equal(heads[0], heads[1])
    assert model.head.weight is weight
    torch.testing.assert_close(weight.detach(), heads.mean(0))


def test_a_validation_function_goes_task_by_task():
    source = rounds(60, seed=1, batch_size=20, shuffle=False)
    config = TrainConfig(epochs=2, lr=0.02)
    want = peft_ml(network(), rounds(), config, DORA, validation=source)
    found = peft_ml(
        network(), rounds(), config, DORA, validation=lambda m: evaluate(m, by_task(source))
    )
    assert found.history == want.history
    message = r"peft_ml: .* one task at a time, got samples of tasks \[0, 1, 2\]"
    with pytest.raises(ValueError, match=message):
        peft_ml(network(), rounds(), config, DORA, validation=lambda m: evaluate(m, source))
    with pytest.raises(ValueError, match="peft_ml: which task do the samples belong to"):
        peft_ml(network(), rounds(), config, DORA, validation=lambda m: m(torch.randn(1, 8)))


def test_rounds_by_task_measure_the_same():
    source, seen = rounds(60, batch_size=20), []

    def forward(model, inputs):
        seen.append(len(inputs))
        return model(inputs)

    model = network().eval()
    assert evaluate(model, by_task(source), forward=forward) == evaluate(model, source)
    assert seen == [20] * T
    with tasks(torch.zeros(1, dtype=torch.int64)):
        assert len(by_task(source)) == len(source)
    assert by_task(source).rounds_per_task == source.rounds_per_task


def test_an_interrupted_training_goes_on_in_the_same_bits(tmp_path):
    pytest.importorskip("safetensors", reason="needs the package safetensors")
    config, path = TrainConfig(epochs=3, lr=0.02), tmp_path / "training.safetensors"
    score = lambda m: 0.0  # noqa: E731
    want = peft_ml(network(), rounds(), config, DORA, validation=score)
    scores = iter([0.0])  # and then StopIteration, in the second epoch
    with pytest.raises(StopIteration):
        peft_ml(
            network(),
            rounds(),
            config,
            DORA,
            validation=lambda m: next(scores),
            callbacks=[Checkpoint(path)],
        )
    model = network()
    got = peft_ml(model, rounds(), config, DORA, validation=score, callbacks=[Checkpoint(path)])
    assert got.history == want.history
    for task in range(T):
        for name, value in want.adapters[task].items():
            assert torch.equal(got.adapters[task][name], value)
    other = peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True, lora_alpha=4)
    with pytest.raises(ValueError, match=r"does not fit the training: peft\.lora_alpha 8, here 4"):
        peft_ml(network(), rounds(), config, other, callbacks=[Checkpoint(path)])


def test_fine_tuning_leaves_the_model_as_it_was():
    model = network()
    model.body[0].bias.requires_grad_(False)
    before, start = snapshot(model), values(model)
    source = rounds(60, seed=1, batch_size=20, shuffle=False)
    config = peft.LoraConfig(r=2, target_modules=["body.0"], modules_to_save=["head"])
    result = finetune_peft(
        model, rounds(), TrainConfig(epochs=5, lr=0.05), config, validation=source
    )
    assert snapshot(model) == before
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert result.last_metric > 0.6
    adapted = peft.get_peft_model(model, config)
    accuracies = []
    for task in range(T):
        peft.set_peft_model_state_dict(adapted, result.adapters[task])
        accuracies.append(evaluate(adapted, source).per_task[task])
    assert accuracies == result.history[-1]["validation_per_task"]


def test_fine_tuning_leaves_modes_and_running_statistics():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).eval()
    start = values(model)
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    finetune_peft(model, rounds(), TrainConfig(epochs=1, lr=0.05), config)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


class Buffers(nn.Module):
    """Buffers that cannot be written to, and that forward assigns anew."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 2)
        self.register_buffer("ones", torch.ones(1).expand(2))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x) * self.ones


def test_fine_tuning_leaves_buffers():
    model = Buffers()
    mean = model.mean
    config = peft.LoraConfig(r=2, target_modules=["layer"], use_dora=True)
    finetune_peft(model, rounds(), TrainConfig(epochs=1, lr=0.05), config)
    assert model.mean is mean and not mean.any()


def test_a_frozen_base_is_not_retrained_by_peft_ml():
    model, config = network().requires_grad_(False), peft.LoraConfig(r=2, target_modules=["body.0"])
    with pytest.raises(ValueError, match=r"^peft_ml: all weights that tasks share are frozen"):
        peft_ml(model, rounds(), TrainConfig(epochs=1, lr=0.1), config)


def test_methods_that_never_train_the_weights_can_fine_tune():
    config = peft.HRAConfig(r=2, target_modules=["body.0"])
    assert finetune_peft(network(), rounds(), TrainConfig(epochs=1, lr=0.02), config).adapters
    with pytest.raises(ValueError, match="peft_ml: HRA computes with a detached copy"):
        peft_ml(network(), rounds(), TrainConfig(epochs=1, lr=0.02), config)


REFUSED = {
    "peft_ml: ADALORA allows one trainable adapter": peft.AdaLoraConfig(
        total_step=5, target_modules=["head"]
    ),
    "peft_ml: POLY has tasks of its own": peft.PolyConfig(target_modules=["head"]),
    "peft_ml: LORA starts by changing the weights that all tasks share": peft.LoraConfig(
        init_lora_weights="pissa", target_modules=["head"]
    ),
    "supports only 1 adapter with bias": peft.LoraConfig(bias="all", target_modules=["head"]),
    "peft_ml: PROMPT_TUNING needs a task_type": peft.PromptTuningConfig(num_virtual_tokens=2),
    "heed": peft.IA3Config(target_modules=["heed"], feedforward_modules=[]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_done_is_refused_and_nothing_changed(message):
    model = network()
    before, start = snapshot(model), values(model)
    with pytest.raises(ValueError, match=re.escape(message)):
        peft_ml(model, rounds(), TrainConfig(epochs=1, lr=0.1), REFUSED[message])
    assert snapshot(model) == before
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_a_failed_retraining_gives_the_plain_model_back():
    model = network()
    before = snapshot(model)
    with pytest.raises(ZeroDivisionError):
        peft_ml(model, rounds(), TrainConfig(epochs=1, lr=0.1), DORA, validation=lambda m: 1 / 0)
    assert snapshot(model) == before


def test_wrong_arguments(monkeypatch):
    config = TrainConfig(epochs=1, lr=0.1)
    with pytest.raises(TypeError, match=r"peft_config must be a configuration of peft.*got dict"):
        peft_ml(network(), rounds(), config, {"r": 8})
    with pytest.raises(ValueError, match="adapters of peft already; pass what its unload"):
        peft_ml(peft.get_peft_model(network(), DORA), rounds(), config, DORA)
    adapted = adapt(network(), LoRAConfig(rank=1), T)
    with pytest.raises(ValueError, match=r"finetune_peft: the model has adapters already; metal"):
        finetune_peft(adapted, rounds(), config, DORA)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="peft_ml: needs the package peft; pip install "):
        peft_ml(network(), rounds(), config, DORA)


def test_torch_encoders_call_the_adapters_in_inference():
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    seen = []

    def validation(adapted):
        linear = adapted.base_model.model.linear1
        linear.lora_A["task0"].register_forward_hook(lambda *_: seen.append(True))
        x = torch.randn(2, 4, 8)
        with torch.no_grad():
            return float(adapted.eval()(x).sum())

    config = peft.LoraConfig(r=2, target_modules=["linear1"])
    data = RoundLoader(torch.randn(4, 4, 8), torch.zeros(4, 8), torch.zeros(4).long(), batch_size=4)
    before = snapshot(model)
    peft_ml(
        model,
        data,
        TrainConfig(epochs=1, lr=0.1),
        config,
        fused=False,
        loss=lambda out, batch: (out.mean(1) - batch.targets).square().mean(1),
        validation=validation,
    )
    assert seen
    assert snapshot(model) == before
    assert model.activation_relu_or_gelu == 1


def roberta(cls):
    torch.manual_seed(0)
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    return cls(
        transformers.RobertaConfig(
            vocab_size=40,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
    )


def sequences():
    inputs = {
        "input_ids": torch.randint(3, 40, (12, 5)),
        "attention_mask": torch.ones(12, 5).long(),
    }
    return RoundLoader(inputs, torch.randint(2, (12,)), torch.arange(12) % T, batch_size=4)


def versions_line(config, model):
    """What peft_ml says where the method does not work with the installed packages."""
    return (
        rf"peft_ml: {config.peft_type.value} of peft {peft.__version__} on {type(model).__name__} "
        rf"of transformers {sys.modules['transformers'].__version__} .*; choose another method"
    )


@pytest.mark.parametrize(
    "config", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"]
)
def test_prompt_learning(config):
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")
    model, source = roberta(transformers.RobertaForSequenceClassification), sequences()
    before, start = snapshot(model), values(model)
    adapter = getattr(peft, config)(num_virtual_tokens=2, task_type="SEQ_CLS", inference_mode=True)
    train = TrainConfig(epochs=2, lr=0.01)
    reason = what_peft_alone_says(copy.deepcopy(model), adapter, next(iter(source)).inputs)
    if reason is not None:
        with pytest.raises(RuntimeError, match=versions_line(adapter, model)) as raised:
            peft_ml(model, source, train, adapter)
        assert reason in str(raised.value)
        assert snapshot(model) == before
        pytest.skip(str(raised.value))
    result = peft_ml(model, source, train, adapter)
    assert snapshot(model) == before
    name = "roberta.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(model.state_dict()[name], start[name])
    assert not torch.equal(
        result.adapters[0]["prompt_embeddings"], result.adapters[1]["prompt_embeddings"]
    )


def what_peft_alone_says(model, config, inputs):
    """The error with which a method of peft fails on ``model`` without metalora, or None."""
    adapted = peft.get_peft_model(model, copy.deepcopy(config))
    model(**inputs)
    try:
        adapted(**inputs)
    except Exception as error:
        return f"{type(error).__name__}: {error}".rstrip(".")
    return None


def test_a_method_that_does_not_work_on_the_model_is_named_with_the_versions():
    transformers = pytest.importorskip("transformers", reason="needs the package transformers")

    class OfIds(transformers.RobertaForSequenceClassification):
        def forward(self, input_ids, attention_mask=None):  # peft gives inputs_embeds
            return super().forward(input_ids, attention_mask)

    model, config = roberta(OfIds), TrainConfig(epochs=1, lr=0.01)
    before = snapshot(model)
    adapter = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    with pytest.raises(RuntimeError, match=versions_line(adapter, model)) as raised:
        peft_ml(model, sequences(), config, adapter)
    assert "fails where the model alone does not: TypeError: " in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1
    assert snapshot(model) == before


def test_a_method_that_cannot_be_set_up_is_named_with_the_versions():
    adapter = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS")
    wanted = (
        rf"peft_ml: PROMPT_TUNING of peft {peft.__version__} on Network of torch "
        rf"{re.escape(torch.__version__)} cannot be set up: "
    )
    model = network()
    before = snapshot(model)
    with pytest.raises(RuntimeError, match=wanted):
        peft_ml(model, rounds(), TrainConfig(epochs=1, lr=0.1), adapter)
    assert snapshot(model) == before


def test_faults_of_the_data_and_of_later_calls_are_raised_as_they_are():
    config = TrainConfig(epochs=1, lr=0.01)
    wide = RoundLoader(torch.randn(9, 9), torch.zeros(9).long(), torch.arange(9) % T, batch_size=9)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        peft_ml(network(), wide, config, DORA)

    class Later(Network):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == 2:
                raise KeyError("once")
            return super().forward(x)

    with pytest.raises(KeyError, match="once"):
        peft_ml(Later(), rounds(), config, DORA)
