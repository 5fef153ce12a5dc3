"""The three layers against plain einsums over each sample's own task."""

import re
import warnings

import pytest
import torch
from torch import nn

from metalora.nn import MultiTaskHead, MultiTaskLoRALinear, SymmetricLoRALinear, TaskBatch, tasks

IDS = torch.tensor([2, 0, 3, 0, 2, 2])  # unsorted, ragged, task 1 empty


def lora(**options):
    layer = MultiTaskLoRALinear(5, 3, num_tasks=4, rank=2, alpha=3, dtype=torch.float64, **options)
    nn.init.normal_(layer.lora_B)
    return layer


def symmetric():
    return SymmetricLoRALinear(5, num_tasks=4, rank=2, alpha=3, dtype=torch.float64)


def head(**options):
    return MultiTaskHead(5, 3, num_tasks=4, dtype=torch.float64, **options)


def weights_of_tasks(layer):
    """[T, out, in] of the matrices that a layer stands for."""
    if isinstance(layer, MultiTaskHead):
        return layer.weight
    if isinstance(layer, SymmetricLoRALinear):
        update = torch.einsum("tok,tik->toi", layer.lora_U, layer.lora_U)
    else:
        update = torch.einsum("tor,tri->toi", layer.lora_B, layer.lora_A)
    return layer.weight + 1.5 * update  # alpha / rank = 3 / 2


def expected(layer, x, ids):
    y = torch.einsum("b...i,boi->b...o", x, weights_of_tasks(layer)[ids])
    if layer.bias is None:
        return y
    bias = layer.bias[ids] if isinstance(layer, MultiTaskHead) else layer.bias.expand(len(ids), -1)
    return y + bias.view(len(ids), *[1] * (x.dim() - 2), -1)


LAYERS = [lora, symmetric, head]


@pytest.mark.parametrize("middle", [(), (4,), (2, 3)])
@pytest.mark.parametrize("make", LAYERS)
def test_each_sample_runs_with_its_own_task(make, middle):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(6, *middle, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x, TaskBatch(IDS))
    want = expected(layer, x, IDS)
    torch.testing.assert_close(y, want, rtol=0, atol=1e-12)
    inputs = [x, *layer.parameters()]
    probe = torch.randn_like(y)
    got_gradients = torch.autograd.grad(y, inputs, probe)
    for got, wanted in zip(got_gradients, torch.autograd.grad(want, inputs, probe), strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", LAYERS)
def test_context_and_argument_say_the_same(make):
    layer, x = make(), torch.randn(6, 5, dtype=torch.float64)
    with tasks(IDS):
        ambient = layer(x)
    assert torch.equal(ambient, layer(x, TaskBatch(IDS)))
    assert not torch.equal(ambient, layer(x, TaskBatch(IDS.flip(0))))


@pytest.mark.parametrize("counts", [None, (2, 0, 1, 1)])
@pytest.mark.parametrize("make", LAYERS)
def test_samples_of_unequal_length_may_be_packed(make, counts):
    torch.manual_seed(0)
    layer, ids, lengths = make(), torch.tensor([0, 0, 2, 3]), [3, 1, 0, 4]
    batch = TaskBatch(ids, counts=counts, lengths=lengths)
    parts = [torch.randn(1, n, 5, dtype=torch.float64, requires_grad=True) for n in lengths]
    y = layer(torch.cat(parts, 1), batch)
    want = [layer(part, TaskBatch(task)) for part, task in zip(parts, ids.split(1), strict=True)]
    torch.testing.assert_close(y, torch.cat(want, 1), rtol=0, atol=1e-12)
    probe, inputs = torch.randn_like(y), [*parts, *layer.parameters()]
    wanted = torch.autograd.grad(torch.cat(want, 1), inputs, probe)
    for got, gradient in zip(torch.autograd.grad(y, inputs, probe), wanted, strict=True):
        torch.testing.assert_close(got, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.filterwarnings("ignore:sample order")
def test_packed_and_plain_inputs_share_a_context(make):
    layer, packed = make(), TaskBatch(torch.tensor([0, 0, 2]), lengths=[3, 1, 2])
    for shape in [(3, 5), (9, 5), (3, 2, 5)]:  # (9, 5): three parts of every sample
        x = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(layer(x, packed), layer(x, TaskBatch(packed.task_ids)))
    rows = torch.randn(6, 5, dtype=torch.float64)  # as many as are packed, so not two parts each
    assert torch.equal(layer(rows, packed), layer(rows[None], packed)[0])
    message = "or packed [1, 6, in], as task_ids are [3]; got [1, 5, 5]"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer(torch.randn(1, 5, 5, dtype=torch.float64), packed)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.filterwarnings("ignore:sample order")
def test_samples_may_be_flattened_with_their_parts(make):
    layer, x = make(), torch.randn(6, 4, 5, dtype=torch.float64)
    flat = layer(x.reshape(24, 5), TaskBatch(IDS))
    torch.testing.assert_close(flat, layer(x, TaskBatch(IDS)).reshape(24, -1), rtol=0, atol=0)


@pytest.mark.parametrize("make", LAYERS)
def test_order_of_the_samples_does_not_matter(make):
    layer, x = make(), torch.randn(6, 5, dtype=torch.float64)
    order = torch.argsort(IDS)
    shuffled = layer(x, TaskBatch(IDS))
    torch.testing.assert_close(
        shuffled[order], layer(x[order], TaskBatch(IDS[order])), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("make", LAYERS)
def test_empty_batch(make):
    layer = make()
    y = layer(
        torch.empty(0, 4, 5, dtype=torch.float64), TaskBatch(torch.empty(0, dtype=torch.int64))
    )
    assert y.shape == (0, 4, layer.out_features)


@pytest.mark.parametrize("make", [lora, head])
def test_without_bias(make):
    layer, x = make(bias=False), torch.randn(6, 5, dtype=torch.float64)
    assert layer.bias is None
    torch.testing.assert_close(layer(x, TaskBatch(IDS)), expected(layer, x, IDS))


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiTaskLoRALinear(5, 3, num_tasks=1, rank=2),
        lambda: SymmetricLoRALinear(5, num_tasks=1, rank=2),
        lambda: MultiTaskHead(5, 3, num_tasks=1),
    ],
)
def test_one_task_needs_no_context_but_heeds_it(make):
    layer, x = make(), torch.randn(4, 2, 5)
    with tasks(torch.zeros(4, dtype=torch.int64)):
        inside = layer(x)
    torch.testing.assert_close(layer(x), inside)
    with pytest.raises(ValueError, match=r"0\.\.0"), tasks(torch.tensor([0, 0, 1, 0])):
        layer(x)


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("task", [0, 3])
def test_plain_layer_of_a_task(make, task):
    layer, x = make(), torch.randn(6, 5, dtype=torch.float64)
    plain = layer.to_linear(task)
    assert type(plain) is nn.Linear
    ids = torch.full((6,), task)
    torch.testing.assert_close(plain(x), layer(x, TaskBatch(ids)), rtol=0, atol=1e-12)


def test_plain_layer_without_task_has_the_shared_parameters_or_the_mean_head():
    layer = lora()
    assert layer.to_linear().weight is layer.weight
    assert layer.to_linear().bias is layer.bias
    heads = head()
    torch.testing.assert_close(heads.to_linear().weight, heads.weight.mean(0))
    torch.testing.assert_close(heads.to_linear().bias, heads.bias.mean(0))


def test_lora_starts_at_the_base_layer_with_a_kaiming_uniform_a_per_task():
    torch.manual_seed(0)
    layer = MultiTaskLoRALinear(400, 30, num_tasks=3, rank=8)
    assert (layer.lora_B == 0).all()
    bound = 1 / 400**0.5  # kaiming_uniform(a=sqrt(5)) of [r, in]
    for a in layer.lora_A:
        assert a.abs().max() <= bound
        assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])


def test_symmetric_factors_start_small_and_not_at_zero():
    layer = SymmetricLoRALinear(400, num_tasks=3, rank=8)
    assert layer.lora_U.std().item() == pytest.approx((0.1 / 400) ** 0.5, rel=0.05)


def test_dropout_acts_in_training_only_and_on_the_adapters_only():
    torch.manual_seed(0)
    layer, x, batch = lora(dropout=0.5), torch.randn(6, 5, dtype=torch.float64), TaskBatch(IDS)
    plain = expected(layer, x, IDS)
    torch.testing.assert_close(layer.eval()(x, batch), plain)
    layer.train()
    torch.manual_seed(1)
    dropped = layer(x, batch)
    assert not torch.allclose(dropped, plain)
    torch.manual_seed(1)
    assert torch.equal(layer(x, batch), dropped)
    nn.init.zeros_(layer.lora_B)
    torch.testing.assert_close(layer(x, batch), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("make", LAYERS)
def test_autocast_computes_in_the_low_precision(make):
    layer, x = make().float(), torch.randn(6, 4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, TaskBatch(IDS))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x, TaskBatch(IDS)), rtol=0.05, atol=0.05)
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in layer.parameters())


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((6, 4), "x must be [B, ..., in=5], got [6, 4]"),
        ((5,), "x must be [B, ..., in=5], got [5]"),
        ((4, 5), "samples first, [B=6, ..., in]"),
        ((7, 2, 5), "samples first, [B=6, ..., in]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(make, shape, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make()(torch.randn(shape, dtype=torch.float64), TaskBatch(IDS))
    assert str(list(shape)) in str(caught.value)


@pytest.mark.parametrize("make", LAYERS)
def test_missing_context_is_explained(make):
    layer = make()
    layer.name = "encoder.fc"
    with pytest.raises(ValueError, match=r"'encoder\.fc': which task .*with metalora\.tasks"):
        layer(torch.randn(6, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="tasks must be a TaskBatch, got Tensor"):
        layer(torch.randn(6, 5, dtype=torch.float64), IDS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be an int >= 1, got 0"),
        ({"rank": -2}, ValueError, "rank must be an int >= 1, got -2"),
        ({"rank": 1.5}, TypeError, "rank must be an int >= 1, got float"),
        ({"num_tasks": 0}, ValueError, "num_tasks must be an int >= 1"),
        ({"alpha": float("nan")}, ValueError, "alpha must be a finite number > 0"),
        ({"dropout": 1.0}, ValueError, "dropout must be in [0, 1)"),
        ({"dropout": -0.1}, ValueError, "dropout"),
        ({"route": "wieght"}, ValueError, "did you mean 'weight'"),
    ],
)
def test_bad_settings_are_refused(options, error, message):
    with pytest.raises(error) as caught:
        MultiTaskLoRALinear(5, 3, **{"num_tasks": 2, "rank": 1, **options})
    assert message in str(caught.value)


def test_rank_above_the_matrix_is_legal_and_noted():
    with pytest.warns(UserWarning, match=r"'fc': rank 4 is above min\(in=5, out=3\) = 3"):
        layer = MultiTaskLoRALinear(5, 3, num_tasks=2, rank=4, name="fc")
    assert layer(torch.randn(2, 5), TaskBatch(torch.tensor([1, 0]))).shape == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiTaskLoRALinear(5, 3, num_tasks=2, rank=4),
        lambda: MultiTaskLoRALinear.from_linear(nn.Linear(5, 3), 2, 4),
        lambda: SymmetricLoRALinear(3, num_tasks=2, rank=4),
    ],
)
def test_the_note_points_at_the_users_line(make):
    with pytest.warns(UserWarning, match="rank 4 is above") as noted:
        make()
    (warning,) = noted
    assert (warning.filename, warning.lineno) == (__file__, make.__code__.co_firstlineno)


def test_symmetric_layer_must_be_square():
    with pytest.raises(ValueError, match=r"square layer, got \[out=3, in=5\]"):
        SymmetricLoRALinear.from_linear(nn.Linear(5, 3), 2, 1)


@pytest.mark.parametrize("task", [-1, 4])
def test_unknown_task_is_refused(task):
    with pytest.raises(ValueError, match=rf"task must be in 0\.\.3, got {task}"):
        lora().to_linear(task)


@pytest.mark.parametrize("make", LAYERS)
def test_tasks_may_be_dropped_twice(make):
    torch.manual_seed(0)
    every, some = make(), make()
    some.hold_tasks([0, 2, 3])
    some.hold_tasks([2, 1])
    assert some.num_tasks == 2 and "tasks=2 of 4" in repr(some)
    for layer in (every, some):
        torch.manual_seed(1)
        layer.redraw_tasks()
    assert some.num_tasks == 2 and "tasks=2 of 4" in repr(some)
    for name, parameter in some.own_task_parameters().items():
        assert torch.equal(parameter, getattr(every, name)[[3, 2]])


def warned(call):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call()
    assert {warning.filename for warning in found} <= {__file__}
    return [str(warning.message) for warning in found]


def test_rows_of_an_order_that_cannot_be_known_are_noted_once():
    encoder = nn.Sequential(lora(name="encoder.0"), MultiTaskLoRALinear(3, 3, 4, 1).double())
    views = torch.randn(12, 5, dtype=torch.float64)  # two of each sample, one batch after another

    def call(ids):
        with tasks(ids):
            encoder(views)

    assert not warned(lambda: call(IDS.repeat(2)))
    assert not warned(lambda: call(torch.full((6,), 2)))  # of one task: any order will do
    (message,) = warned(lambda: call(IDS))  # one warning for both layers
    assert message.startswith("sample order: MultiTaskLoRALinear 'encoder.0' takes x [12, 5] for 2")
    assert "give task_ids.repeat(2). If samples may have unequal" in message
    assert not warned(lambda: call(IDS))


def test_each_number_of_rows_is_noted():
    few, more = lora(name="few"), lora(name="more")

    def call(ids):
        with tasks(ids):
            few(torch.randn(12, 5, dtype=torch.float64))
            more(torch.randn(18, 5, dtype=torch.float64))

    assert [message.split("'")[1] for message in warned(lambda: call(IDS))] == ["few", "more"]


def test_a_weight_of_another_size_than_the_adapters():
    layer = lora(name="output")
    layer.weight = nn.Parameter(torch.zeros(7, 5, dtype=torch.float64))  # as when resized
    with (
        pytest.raises(ValueError, match=r"'output': the weight is \[7, 5\], but .* for \[3, 5\]"),
        tasks(IDS),
    ):
        layer(torch.randn(6, 5, dtype=torch.float64))


@pytest.mark.parametrize("make", LAYERS)
def test_flattened_parts_are_known_by_an_earlier_layer(make):
    first, then = make(), make()
    x = torch.randn(6, 2, 2, 5, dtype=torch.float64)

    def call(rows):
        with tasks(IDS):
            first(x)
            then(rows)

    assert not warned(lambda: call(x.reshape(24, 5)))  # four parts of each, as of x
    (message,) = warned(lambda: call(torch.randn(12, 6, 5, dtype=torch.float64)))
    assert "If it is sequence-first, [L, B, ...], have the samples first." in message


def test_the_note_on_the_order_can_be_silenced():
    layer = lora()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warnings.filterwarnings("ignore", "sample order")
        layer(torch.randn(12, 5, dtype=torch.float64), TaskBatch(IDS))
    assert not found


def test_an_input_that_all_samples_share_is_explained():
    with pytest.raises(ValueError, match=r"shared by all samples, as .* \(exclude_modules\)"):
        lora()(torch.randn(1, 8, 5, dtype=torch.float64), TaskBatch(IDS))
    with pytest.raises(ValueError, match="routed to experts, exclude the layer"):
        lora()(torch.randn(8, 5, dtype=torch.float64), TaskBatch(IDS))


@pytest.mark.parametrize("bias", [True, False])
def test_an_input_of_another_dtype_is_refused_by_the_layer(bias):
    layer = MultiTaskLoRALinear(5, 3, num_tasks=4, rank=2, bias=bias, name="query")
    x = torch.randn(6, 5)
    message = "MultiTaskLoRALinear 'query': x must have the dtype of weight, torch.float32, got"
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(TypeError, match=message):
            layer(x.to(dtype), TaskBatch(IDS))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16(), TaskBatch(IDS)).dtype == torch.bfloat16


def test_adapters_of_another_dtype_than_their_weight_are_explained():
    layer = MultiTaskLoRALinear(5, 3, num_tasks=4, rank=2, dtype=torch.bfloat16)
    layer.lora_A.data = layer.lora_A.data.float()
    with pytest.raises(TypeError, match=r"lora_A must .* keep both in float32 \(model\.float\(\)"):
        layer(torch.randn(6, 5).bfloat16(), TaskBatch(IDS))
