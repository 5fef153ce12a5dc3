"""TaskOptimizer against an optimiser per task, and everything a user's own loop does with it."""

import copy
import io
import pickle
import random
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import metalora
from metalora import LoRAConfig, TaskOptimizer, adapt, task_parameters, tasks
from metalora.adapters import adapted_layers
from metalora.meta.stacked_steps import StackedState
from metalora.nn import MultiTaskLoRALinear, TaskBatch

T, D, CLASSES = 4, 5, 3
LORA = LoRAConfig(rank=2, alpha=3, heads=["2"])
KINDS = {
    "sgd": partial(torch.optim.SGD, lr=0.05, momentum=0.9, dampening=0.3, weight_decay=0.01),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.02, amsgrad=True),
    "adamw": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1, lr_decay=0.1),
    "nadam": partial(torch.optim.NAdam, lr=0.01, weight_decay=0.02),
    "adafactor": partial(torch.optim.Adafactor, lr=0.01, weight_decay=0.02),  # not elementwise
}


@pytest.fixture(autouse=True, params=[1, 10], ids=["stacked", "slices"])
def stacked_from(request, monkeypatch):
    """Absent tasks in either way: from stacked values, and slice by slice as T is small."""
    monkeypatch.setattr("metalora.meta.task_optimizer.STACKED_FROM", request.param)
    return request.param


def network(dtype=torch.float64, config=LORA, num_tasks=T):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 6), nn.Tanh(), nn.Linear(6, CLASSES)).to(dtype)
    adapt(model, config, num_tasks)
    for parameter in task_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def batches(count, seed=0, first_complete=0):
    """Ragged batches in any order, of which all but the first few lack some tasks."""
    source = random.Random(seed)
    made = []
    for number in range(count):
        present = list(range(T)) if number < first_complete else source.sample(range(T), 2)
        ids = [t for t in present for _ in range(source.randint(1, 4))]
        source.shuffle(ids)
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(len(ids), D, generator=generator, dtype=torch.float64)
        y = torch.randint(CLASSES, (len(ids),), generator=generator)
        made.append((x, y, torch.tensor(ids)))
    return made


def backward(model, batch, scale=1.0):
    x, y, ids = batch
    with tasks(ids):
        losses = F.cross_entropy(model(x.to(next(model.parameters()))), y, reduction="none")
    (metalora.task_mean(losses, ids) * scale).backward()


def train(model, optimizer, data):
    for batch in data:
        backward(model, batch)
        optimizer.step()
        optimizer.zero_grad()


def make(model, kind, **options):
    options = {**KINDS[kind].keywords, **options}
    return TaskOptimizer(model, KINDS[kind].func, **options)


class Separate:
    """An optimiser of torch for the shared parameters, and one for each task."""

    def __init__(self, model, make_optimizer):
        own = {id(p) for p in task_parameters(model)}
        leaf = lambda tensor: tensor.detach().clone().requires_grad_()  # noqa: E731
        self.shared = {n: leaf(p) for n, p in model.named_parameters() if id(p) not in own}
        self.own = [
            {n: leaf(p[t]) for n, p in model.named_parameters() if id(p) in own} for t in range(T)
        ]
        parts = [part for part in [self.shared, *self.own] if part]
        self.optimizers = [make_optimizer(list(part.values())) for part in parts]

    def step(self, model, present):
        """One step with the model's gradients, of those tasks that are present."""
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            if name in self.shared:
                self.shared[name].grad = None if grad is None else grad.clone()
                continue
            for task, part in enumerate(self.own):
                have = grad is not None and task in present
                part[name].grad = grad[task].clone() if have else None
        for optimizer in self.optimizers:
            optimizer.step()

    def check(self, model, tolerance=0.0):
        for name, parameter in model.named_parameters():
            want = self.shared.get(name)
            if want is None:
                want = torch.stack([part[name] for part in self.own])
            torch.testing.assert_close(parameter, want, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize("complete", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_an_optimiser_per_task(kind, complete):
    model = network()
    plain = {} if kind == "adafactor" else {"foreach": False}
    separate = Separate(model, partial(KINDS[kind], **plain))
    optimizer = make(model, kind, **plain)
    for x, y, ids in batches(20, first_complete=complete):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model)


@pytest.mark.parametrize("complete", [0, 3])
@pytest.mark.parametrize("kind", ["plain sgd", "sgd", "adam", "adamw"])
def test_fused_kernels_equal_it_too(kind, complete):
    model, make_separate = network(), KINDS.get(kind) or partial(torch.optim.SGD, lr=0.1)
    separate = Separate(model, make_separate)
    optimizer = TaskOptimizer(model, make_separate.func, **make_separate.keywords)
    assert optimizer.param_groups[0]["fused"] == (kind != "sgd")  # whole parameters
    for x, y, ids in batches(20, first_complete=complete):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model, 1e-15)


def test_the_comparison_would_notice_a_plain_optimiser():
    model = network()
    separate = Separate(model, KINDS["adamw"])
    optimizer = KINDS["adamw"](model.parameters())
    for x, y, ids in batches(4):
        backward(model, (x, y, ids))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(AssertionError):
        separate.check(model, 1e-6)


def own_state(optimizer, model, task):
    """A task's adapters and heads, and what the optimiser keeps of them."""
    found = []
    for parameter in task_parameters(model):
        found.append(parameter[task].detach().clone())
        for key, value in optimizer.state[parameter].items():
            if key != "tasks_with_state":
                found.append((value[task] if value.dim() else value).clone())
    return found


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adafactor"])
def test_an_absent_task_keeps_everything(kind):
    model = network()
    optimizer = make(model, kind)
    train(model, optimizer, batches(3, first_complete=3))
    for x, y, ids in batches(4):
        before = [own_state(optimizer, model, task) for task in range(T)]
        train(model, optimizer, [(x, y, ids)])
        after = [own_state(optimizer, model, task) for task in range(T)]
        moved = {t for t in range(T) if not same(before[t], after[t])}
        assert moved == set(ids.tolist())


@pytest.mark.parametrize("options", [{}, {"foreach": False}])
def test_complete_steps_are_taken_on_whole_parameters_and_then_task_by_task(options, stacked_from):
    model = network()
    optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=0.01, **options)
    shared, own = optimizer.param_groups
    train(model, optimizer, batches(2, first_complete=2))
    assert [len(g["params"]) for g in optimizer.inner.param_groups] == [2, 4]
    assert optimizer.state[own["params"][0]]["step"] == 2
    train(model, optimizer, batches(1))
    stacked = not options and stacked_from <= T  # fused kernels take them from the stacked state
    slices = 0 if stacked else 4 * T
    assert [len(g["params"]) for g in optimizer.inner.param_groups] == [2, slices]
    present = set(batches(1)[0][2].tolist())
    steps = optimizer.state[own["params"][0]]["step"]
    assert steps.tolist() == [3.0 if task in present else 2.0 for task in range(T)]
    assert optimizer.param_groups == [shared, own] and own["params"][0].shape[0] == T


@pytest.mark.parametrize("order", ["zero last", "zero first", "zero between"])
@pytest.mark.parametrize("through", ["optimizer", "model"])
def test_zero_grad_may_stand_anywhere(order, through):
    model = network()
    optimizer = make(model, "adamw")
    separate = Separate(model, KINDS["adamw"])
    zero_grad = optimizer.zero_grad if through == "optimizer" else model.zero_grad
    for x, y, ids in batches(6):
        if order == "zero first":
            zero_grad()
        with tasks(ids):
            losses = F.cross_entropy(model(x), y, reduction="none")
        if order == "zero between":
            zero_grad()
        metalora.task_mean(losses, ids).backward()
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        separate.check(model, 1e-15)
        if order == "zero last":
            zero_grad()


@pytest.mark.parametrize("through", ["optimizer", "model"])
def test_accumulated_passes_count_together_and_discarded_ones_do_not(through):
    model = network()
    optimizer, separate = make(model, "adamw"), Separate(model, KINDS["adamw"])
    zero_grad = optimizer.zero_grad if through == "optimizer" else model.zero_grad
    train(model, optimizer, [])
    for number in range(0, 12, 3):
        thrown_away, *kept = batches(12)[number : number + 3]
        backward(model, thrown_away)
        zero_grad()
        for batch in kept:
            backward(model, batch, 0.5)
        separate.step(model, {t for _, _, ids in kept for t in ids.tolist()})
        optimizer.step()
        zero_grad()
        separate.check(model, 1e-15)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_passes_without_a_backward_do_not_count(mode):
    """An evaluation between steps; with grad enabled it is forgotten at the next step too."""
    model = network()
    optimizer, separate = make(model, "adamw"), Separate(model, KINDS["adamw"])
    every = torch.arange(T)
    for x, y, ids in batches(6):
        backward(model, (x, y, ids))
        with mode(), tasks(every.clone()):
            model(torch.randn(T, D, dtype=torch.float64))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model, 1e-15)


def test_two_models_in_one_loop_do_not_disturb_each_other():
    first, second = network(), network()
    optimizers = [make(model, "adamw") for model in (first, second)]
    separate = [Separate(model, KINDS["adamw"]) for model in (first, second)]
    for one, other in zip(batches(6), batches(6, seed=1), strict=True):
        backward(first, one)
        backward(second, other)
        for model, mine, optimizer, batch in zip(
            (first, second), separate, optimizers, (one, other), strict=True
        ):
            mine.step(model, set(batch[2].tolist()))
            optimizer.step()
            mine.check(model, 1e-15)
            optimizer.zero_grad()


class ByArgument(nn.Module):
    """Gives its layers their tasks itself: the second runs without the largest."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        options = {"num_tasks": T, "rank": 2, "dtype": torch.float64}
        self.first = MultiTaskLoRALinear(D, D, **options)
        self.second = MultiTaskLoRALinear(D, D, **options)

    def forward(self, x, ids):
        x = torch.tanh(self.first(x, tasks=TaskBatch(ids)))
        some = ids < ids.max()
        return self.second(x[some], tasks=TaskBatch(ids[some]))


def test_tasks_given_by_argument_count_layer_by_layer():
    model = ByArgument()
    optimizer = TaskOptimizer(model, torch.optim.Adam, lr=0.1)
    for ids in ([0, 1, 2, 3], [0, 2, 3]):
        optimizer.zero_grad()
        model(torch.randn(len(ids), D, dtype=torch.float64), torch.tensor(ids)).sum().backward()
        optimizer.step()
    assert optimizer.state[model.first.lora_B]["step"].tolist() == [2, 1, 2, 2]
    assert optimizer.state[model.second.lora_B]["step"].tolist() == [2, 1, 2, 0]
    assert optimizer.state[model.second.lora_B]["tasks_with_state"].tolist() == [1, 1, 1, 0]


class Checkpointed(nn.Module):
    def __init__(self, model, reentrant):
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_changes_nothing(reentrant):
    models = [network(), network()]
    models[1] = Checkpointed(models[1], reentrant)
    for model in models:
        optimizer = make(model, "adamw")
        for x, y, ids in batches(6):
            with tasks(ids):
                losses = F.cross_entropy(model(x.clone()), y, reduction="none")
                metalora.task_mean(losses, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert same(models[0].parameters(), models[1].parameters())


def compiled_loop(model, optimizer, called):
    for number, (x, y, ids) in enumerate(batches(8, first_complete=2)):
        with tasks(ids):
            losses = F.cross_entropy(called(x), y, reduction="none")
        metalora.task_mean(losses, ids).backward()
        if number % 2:  # two passes a step
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.exhaustive)]
)
def test_a_compiled_model_is_stepped_the_same_and_not_recompiled(backend):
    from torch._dynamo.testing import CompileCounterWithBackend

    want, model, unwatched = network(), network(), network()
    compiled_loop(want, make(want, "adamw"), want)
    counts = []
    plain = torch.optim.AdamW(unwatched.parameters())
    for each, optimizer in ((unwatched, plain), (model, make(model, "adamw"))):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend(backend)
        compiled_loop(each, optimizer, torch.compile(each, backend=counter, fullgraph=True))
        counts.append(counter.frame_count)
    for got, wanted in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
    assert counts[0] == counts[1], "compiled more often for other tasks than without"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("complete", [0, 5])
def test_a_resumed_training_ends_in_the_same_bits(kind, complete):
    data = batches(12, first_complete=complete)
    whole, stopped = network(), network()
    train(whole, make(whole, kind), data)
    optimizer = make(stopped, kind)
    train(stopped, optimizer, data[:4])
    file = io.BytesIO()
    torch.save({"model": stopped.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network()
    resumed.load_state_dict(saved["model"])
    optimizer = make(resumed, kind)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, data[4:])
    assert same(resumed.parameters(), whole.parameters())


def test_an_earlier_state_can_be_taken_back():
    """Of an optimiser whose tasks were not apart yet, by one whose tasks are."""
    model = network()
    optimizer = make(model, "adamw")
    fresh = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, batches(2, first_complete=2))
    kept = copy.deepcopy([optimizer.state_dict(), model.state_dict()])
    train(model, optimizer, batches(3, seed=1))
    want = [p.detach().clone() for p in model.parameters()]
    optimizer.load_state_dict(kept[0])
    model.load_state_dict(kept[1])
    train(model, optimizer, batches(3, seed=1))
    assert same(model.parameters(), want)
    optimizer.load_state_dict(fresh)
    assert not optimizer.state and not optimizer.inner.state


def refused(error, message, function, *arguments, **options):
    with pytest.raises(error) as caught:
        function(*arguments, **options)
    text = str(caught.value)
    assert message in text and "\n" not in text and text.startswith("TaskOptimizer"), text


def test_another_models_or_optimisers_state_is_refused():
    def state(kind, model):
        optimizer = make(model, kind)
        train(model, optimizer, batches(3, first_complete=1))
        return optimizer.state_dict()

    model = network()
    optimizer = make(model, "adamw")
    train(model, optimizer, batches(2))
    before = copy.deepcopy(optimizer.state_dict())
    load = optimizer.load_state_dict
    wider = network(config=LoRAConfig(rank=3, alpha=3, heads=["2"]))
    no_heads = network(config=LoRAConfig(rank=2, alpha=3))
    message = "must be of torch.optim.adamw.AdamW, as this optimiser is, got torch.optim.adam.Adam"
    refused(ValueError, message, load, state("adam", network()))
    refused(
        ValueError, "of an equal model, with 'exp_avg' [4, 2, 5], got", load, state("adamw", wider)
    )
    refused(ValueError, "groups of [2, 4] parameters, got [4, 4]", load, state("adamw", no_heads))
    plain = torch.optim.AdamW(network().parameters()).state_dict()
    refused(ValueError, "groups of [2, 4] parameters, got [6]", load, plain)
    refused(ValueError, "must hold 'state' and 'param_groups', got []", load, {})
    stray = {**before, "state": {9: {}}}
    refused(ValueError, "must be of parameters 0..5, got number 9", load, stray)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for number, values in before["state"].items():
        assert all(torch.equal(v, after["state"][number][k]) for k, v in values.items())


def test_adapters_have_their_own_rate_and_decay():
    reference = network()
    start = [p.detach().clone() for p in reference.parameters()]
    options = {"lr": 0.1, "weight_decay": 0.1, "fused": False}
    found = []
    for changed in ({}, {"adapter_lr": 0.01}, {"adapter_weight_decay": 0.5}, {"adapter_lr": 0.0}):
        model = network()
        optimizer = TaskOptimizer(model, torch.optim.AdamW, **options, **changed)
        train(model, optimizer, batches(1, first_complete=1))
        names = [name for name, _ in model.named_parameters()]
        found.append(dict(zip(names, model.parameters(), strict=True)))
    own = {n for n in names if "lora" in n or n.startswith("2.")}
    for other in found[1:]:
        for name, value in found[0].items():
            assert torch.equal(value, other[name]) == (name not in own), name
    for name, before in zip(names, start, strict=True):
        assert torch.equal(found[3][name], before) == (name in own), name


def test_schedules_clipping_and_scaling_work_on_the_models_own_parameters():
    model = network()
    optimizer = make(model, "adamw", adapter_lr=0.004)
    assert [p for g in optimizer.param_groups for p in g["params"]] != []
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
        id(p) for p in model.parameters()
    }
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    train(model, optimizer, batches(1))
    schedule.step()
    train(model, optimizer, batches(1))
    assert [g["lr"] for g in optimizer.inner.param_groups] == pytest.approx([0.005, 0.002])
    backward(model, batches(1)[0], 1e3)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert norm > 1
    separate = Separate(model, KINDS["adamw"])
    assert separate is not None and float(
        nn.utils.get_total_norm([p.grad for p in model.parameters()])
    ) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize("kind", ["adamw", "rmsprop"])  # fused, and not
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_skips_and_scales(kind, unscale):
    model, other = network(torch.float32), network(torch.float32)
    optimizer, plain = make(model, kind), make(other, kind)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    for number, (x, y, ids) in enumerate(batches(6)):
        if number == 2:  # of other tasks, skipped as a gradient is infinite
            before = [p.detach().clone() for p in model.parameters()]
            backward(model, batches(1, seed=9)[0], 64.0)
            model[0].weight.grad[0, 0] = torch.inf
            scaler.scale(torch.ones(()))
            scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
            assert scaler.get_scale() == 32.0 and same(model.parameters(), before)
        with tasks(ids):
            losses = F.cross_entropy(model(x.float()), y, reduction="none")
        scaler.scale(metalora.task_mean(losses, ids)).backward()
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        model.zero_grad()
        backward(other, (x, y, ids))
        plain.step()
        plain.zero_grad()
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    for parameter, state in plain.state.items():
        for key, value in state.items():
            mine = next(
                optimizer.state[p]
                for p, q in zip(model.parameters(), other.parameters(), strict=True)
                if q is parameter
            )
            if key in ("step", "tasks_with_state"):
                assert torch.equal(mine[key], value)


def test_a_closure_makes_the_gradients():
    model, other = network(), network()
    optimizer, plain = make(model, "adamw"), make(other, "adamw")
    for batch in batches(4):

        def closure(batch=batch):
            optimizer.zero_grad()
            backward(model, batch)
            return torch.tensor(3.0)

        assert optimizer.step(closure) == 3
        train(other, plain, [batch])
    assert same(model.parameters(), other.parameters())


def test_the_models_dtype_and_place_may_change_before_the_first_step():
    model, other = network(torch.float32), network(torch.float32)
    optimizer = make(model, "adafactor")  # its tasks are apart from the start
    model.double()  # new memory in the same parameters, as after model.to(device)
    other.double()
    train(model, optimizer, batches(3))
    train(other, make(other, "adafactor"), batches(3))
    assert same(model.parameters(), other.parameters())


def test_the_models_dtype_may_change_between_steps_without_state():
    model, other = network(torch.float32), network(torch.float32)
    optimizer = TaskOptimizer(model, torch.optim.SGD, lr=0.1)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        other.to(dtype)
        data = [(x.to(dtype), y, ids) for x, y, ids in batches(3)]
        train(model, optimizer, data)
        train(other, torch.optim.SGD(other.parameters(), lr=0.1), data)
    assert same(model.parameters(), other.parameters())


@pytest.mark.parametrize("counts", [(1, 3, 2, 4), (4, 1)], ids=str)
def test_gradients_are_copied_into_memory_that_is_kept(counts):
    parameter = nn.Parameter(torch.zeros(5, 2))
    state = StackedState(parameter, {})
    for count in counts:
        parameter.grad = torch.randn(5, 2)
        chosen = torch.randperm(5)[:count]
        parts = [*state.gradients(chosen[:1], 0), *state.gradients(chosen[1:], 1)]
        assert torch.equal(torch.stack(parts), parameter.grad[chosen])
    kept = state.gradients(chosen, 0)[0].data_ptr()
    parameter.grad = torch.randn(5, 2)
    assert state.gradients(chosen, 0)[0].data_ptr() == kept


def test_shared_parameters_can_be_added_and_adapters_cannot():
    model = network()
    model[0].weight.requires_grad_(False)
    model[0].lora_A.requires_grad_(False)
    optimizer = make(model, "adamw")
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    model[0].weight.requires_grad_()
    model[0].lora_A.requires_grad_()
    before = [model[0].weight.detach().clone(), model[0].lora_A.detach().clone()]
    optimizer.add_param_group({"params": model[0].weight, "lr": 0.5})
    refused(
        ValueError, "adapters and heads cannot be added", optimizer.add_param_group,
        {"params": [model[0].lora_A]},
    )  # fmt: skip
    train(model, optimizer, batches(2))
    assert (model[0].weight - before[0]).abs().max() > 0.4
    assert torch.equal(model[0].lora_A, before[1])
    resumed = make(network(), "adamw")
    refused(
        ValueError, "must be of an equal model", resumed.load_state_dict, optimizer.state_dict()
    )


def without_decay(model, kind):
    """An optimiser that does not decay the shared bias."""
    optimizer = make(model, kind)
    flat = (p for p in model.parameters() if p.dim() == 1)
    optimizer.add_param_group({"params": flat, "weight_decay": 0.0})
    return optimizer


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adafactor"])
def test_shared_parameters_can_have_settings_of_their_own(kind):
    model, other, alike = network(), network(), network()
    optimizer = without_decay(model, kind)
    assert [len(g["params"]) for g in optimizer.param_groups] == [1, 4, 1]
    other[0].bias.requires_grad_(False)
    added = make(other, kind)
    other[0].bias.requires_grad_(True)
    added.add_param_group({"params": other[0].bias, "weight_decay": 0.0})
    train(model, optimizer, batches(4))
    train(other, added, batches(4))
    train(alike, make(alike, kind), batches(4))
    assert same(model.parameters(), other.parameters())
    assert not torch.equal(model[0].bias, alike[0].bias)

    resumed = without_decay(other, kind)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, batches(2))
    train(other, resumed, batches(2))
    assert same(model.parameters(), other.parameters())


def test_parameters_change_groups_with_their_moments_or_not_at_all():
    model, other = network(), network()
    optimizer, plain = make(model, "adamw"), make(other, "adamw")
    train(model, optimizer, batches(2))
    train(other, plain, batches(2))
    groups = [list(map(id, g["params"])) for g in optimizer.param_groups]
    with pytest.raises(ValueError, match="non-leaf"):
        optimizer.add_param_group({"params": [model[0].weight, model[0].bias * 2]})
    assert [list(map(id, g["params"])) for g in optimizer.param_groups] == groups
    optimizer.add_param_group({"params": [model[0].weight, model[0].bias]})
    assert optimizer.param_groups[0]["params"] == []
    train(model, optimizer, batches(4)[2:])
    train(other, plain, batches(4)[2:])
    assert same(model.parameters(), other.parameters())


def test_a_frozen_base_and_a_single_task():
    model = network()
    metalora.freeze_base(model)
    optimizer = make(model, "adamw")
    assert [len(g["params"]) for g in optimizer.param_groups] == [4]
    train(model, optimizer, batches(2))
    single = network(num_tasks=1)
    optimizer = make(single, "adamw")
    before = [p.detach().clone() for p in single.parameters()]
    single(torch.randn(3, D, dtype=torch.float64)).sum().backward()  # no tasks need be said
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, single.parameters(), strict=True))


def test_a_base_that_was_frozen_before_is_told():
    """PEFT leaves it so; `freeze_base` and a model without shared weights are no mistakes."""
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).requires_grad_(False)
    metalora.adapt(model, metalora.LoRAConfig(rank=2), T)
    with pytest.warns(UserWarning, match=r"all weights .* are frozen, as PEFT .*freeze_base"):
        TaskOptimizer(model, torch.optim.SGD, lr=0.1)
    metalora.freeze_base(model)
    heads = nn.Sequential(nn.Linear(D, D))
    metalora.adapt(heads, metalora.LoRAConfig(target_modules=(), heads=["0"]), T)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskOptimizer(model, torch.optim.SGD, lr=0.1)
        TaskOptimizer(heads, torch.optim.SGD, lr=0.1)


def test_gradients_of_unknown_tasks_are_refused():
    model = network()
    optimizer = make(model, "adamw")
    train(model, optimizer, batches(1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    refused(RuntimeError, "unknown which tasks", optimizer.step)
    optimizer.param_groups[1]["params"] = [nn.Parameter(torch.ones(T))]
    refused(RuntimeError, "other adapters than the model's", optimizer.step)


def test_a_copy_of_the_model_needs_an_optimiser_of_its_own():
    model = network()
    optimizer = make(model, "adamw")
    twin = copy.deepcopy(model)
    assert all(layer.seen is None for layer in adapted_layers(twin).values())
    train(twin, make(twin, "adamw"), batches(2))
    train(model, optimizer, batches(2))
    assert same(model.parameters(), twin.parameters())


def test_sgd_with_momentum_is_not_fused():
    """torch fuses it only where all parameters begin in the same step."""
    options = {"lr": 0.1, "momentum": 0.9}
    assert not make(network(), "sgd").param_groups[0]["fused"]
    refused(
        ValueError, "SGD with momentum cannot be fused", TaskOptimizer, network(), torch.optim.SGD,
        fused=True, **options,
    )  # fmt: skip


def test_wrong_arguments_are_named():
    model = network()
    plain = nn.Linear(2, 2)
    frozen = network().requires_grad_(False)
    heads_frozen = network()
    for parameter in task_parameters(heads_frozen):
        parameter.requires_grad_(False)
    sgd = torch.optim.SGD
    message = "optimizer must be a class of optimisers, such as torch.optim.AdamW, got "
    refused(TypeError, message + "Linear", TaskOptimizer, model, nn.Linear)
    refused(TypeError, message, TaskOptimizer, model, "adamw")
    refused(TypeError, message + "TaskOptimizer", TaskOptimizer, model, TaskOptimizer)
    refused(TypeError, "model must be an nn.Module, got list", TaskOptimizer, [], sgd)
    refused(ValueError, "LBFGS takes several passes", TaskOptimizer, model, torch.optim.LBFGS)
    refused(ValueError, "the model has no adapters; metalora.adapt", TaskOptimizer, plain, sgd)
    refused(ValueError, "no trainable parameters; it is frozen", TaskOptimizer, frozen, sgd)
    for name in ("adapter_lr", "adapter_weight_decay"):
        for value in (-1.0, float("nan")):
            wanted = f"TaskOptimizer: {name} must be a finite number >= 0, got {value}"
            refused(ValueError, wanted, TaskOptimizer, model, sgd, **{name: value})
        wanted = f"{name} is for adapters and heads, but all are frozen"
        refused(ValueError, wanted, TaskOptimizer, heads_frozen, sgd, **{name: 0.1})
    refused(
        ValueError, "adapter_weight_decay cannot be set, as Rprop has no weight_decay",
        TaskOptimizer, model, torch.optim.Rprop, adapter_weight_decay=0.1,
    )  # fmt: skip


class Skipping(nn.Module):
    """Leaves its middle layer out of some passes."""

    def __init__(self):
        super().__init__()
        self.model, self.skip = network(), False
        self.middle = MultiTaskLoRALinear(6, 6, num_tasks=T, rank=2, dtype=torch.float64)
        nn.init.normal_(self.middle.lora_B)
        metalora.freeze_base(self.middle)  # torch steps shared weights whose gradients are zero

    def forward(self, x):
        x = self.model[1](self.model[0](x))
        return self.model[2](x if self.skip else self.middle(x))


@pytest.mark.parametrize("kind", ["adamw", "rmsprop", "adafactor"])
@pytest.mark.parametrize("skipped", [0, 1])
@pytest.mark.parametrize("clipped", [False, True])
def test_a_layer_that_no_pass_reaches_is_left_alone_whether_its_gradients_are_none_or_zero(
    kind, skipped, clipped
):
    models = []
    for set_to_none in (True, False):
        model = Skipping()
        optimizer = make(model, kind)
        for number, batch in enumerate(batches(6, first_complete=2)):
            model.skip = number % 2 == skipped
            optimizer.zero_grad(set_to_none)
            backward(model, batch)
            if clipped:  # writes to the gradients, those that are zero too
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            before = [p.detach().clone() for p in task_parameters(model.middle)]
            optimizer.step()
            assert same(before, task_parameters(model.middle)) == model.skip
        models.append(model)
    assert same(models[0].parameters(), models[1].parameters())


def test_gradients_set_by_hand_after_zeros_are_refused():
    model = network()
    optimizer = make(model, "adamw")
    train(model, optimizer, batches(1))
    backward(model, batches(1)[0])
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    before = [p.detach().clone() for p in task_parameters(model)]
    optimizer.step()
    assert same(before, task_parameters(model))
    for parameter in task_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    refused(RuntimeError, "unknown which tasks", optimizer.step)


def test_it_is_neither_copied_nor_pickled():
    optimizer = make(network(), "adamw")
    message = "make a new TaskOptimizer for the copied model and load its state_dict"
    refused(TypeError, message, copy.deepcopy, optimizer)
    refused(TypeError, message, copy.copy, optimizer)
    refused(TypeError, message, pickle.dumps, optimizer)


def test_gradients_that_are_returned_are_of_no_step():
    """torch.autograd.grad adds nothing to what the optimiser steps by."""
    model = network()
    optimizer, separate = make(model, "adamw"), Separate(model, KINDS["adamw"])
    for x, y, ids in batches(4):
        backward(model, (x, y, ids))
        with tasks(torch.arange(T)):
            value = model(torch.randn(T, D, dtype=torch.float64)).square().sum()
        torch.autograd.grad(value, list(model.parameters()))
        separate.step(model, set(ids.tolist()))
        optimizer.step()
        optimizer.zero_grad()
        separate.check(model, 1e-15)


def test_torchs_distributed_checkpoint_keeps_the_state():
    """As of FSDP2: by names, into an optimiser that has taken no step yet, or some."""
    from torch.distributed.checkpoint.state_dict import (
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    model = network(torch.float32)
    optimizer = TaskOptimizer(model, torch.optim.AdamW, lr=0.01)
    train(model, optimizer, batches(3, first_complete=1))
    saved = get_optimizer_state_dict(model, optimizer)
    wanted = optimizer.state_dict()
    for steps in (0, 2):
        other = network(torch.float32)
        again = TaskOptimizer(other, torch.optim.AdamW, lr=0.5)
        train(other, again, batches(steps))
        set_optimizer_state_dict(other, again, saved)
        found = again.state_dict()
        assert found["param_groups"] == wanted["param_groups"]
        for number, values in wanted["state"].items():
            for key, value in values.items():
                assert torch.equal(found["state"][number][key], value)


def test_sgd_may_get_its_momentum_from_a_schedule():
    """torch's fused SGD takes none where a gradient is missing in the first step."""
    model = network(torch.float32)
    optimizer = TaskOptimizer(model, torch.optim.SGD, lr=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=8)
    with tasks(torch.tensor([1, 2])):
        model[0](torch.randn(2, D)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()
    assert optimizer.param_groups[0]["momentum"] > 0
    train(model, optimizer, batches(2))


def test_a_penalty_on_adapters_is_of_no_task_of_the_step_before():
    model = network()
    optimizer = TaskOptimizer(model, torch.optim.SGD, lr=0.1)
    for task in (0, 1):
        before = model[0].lora_B.detach().clone()
        optimizer.zero_grad()
        (model[0].lora_B.square().sum() * 0.1).backward()
        with tasks(torch.tensor([task])):
            model(torch.randn(1, D, dtype=torch.float64)).sum().backward()
        optimizer.step()
        moved = (model[0].lora_B != before).flatten(1).any(1)
        assert moved.nonzero()[:, 0].tolist() == [task]
