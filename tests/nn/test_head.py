"""The ways in which a head per task is computed, against each sample's own head."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metalora.nn import MultiTaskHead, TaskBatch, tasks

T, D, OUT = 3, 5, 7
SORTED, MIXED, RAGGED = [0, 0, 1, 1, 2, 2], [2, 0, 1, 1, 0, 2], [2, 0, 2, 2, 0, 2]


def case(bias=True, rows=(6,)):
    torch.manual_seed(0)
    head = MultiTaskHead(D, OUT, T, bias=bias, dtype=torch.float64)
    return head, torch.randn(*rows, D, dtype=torch.float64, requires_grad=True)


def check(head, x, found, ids):
    """``ids``: the task of each row of x."""
    wanted = torch.einsum("ni,noi->no", x.reshape(-1, D), head.weight[ids])
    wanted = (wanted if head.bias is None else wanted + head.bias[ids]).view(found.shape)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    inputs, probe = [x, *head.parameters()], torch.randn_like(wanted)
    for got, want in zip(
        torch.autograd.grad(found, inputs, probe),
        torch.autograd.grad(wanted, inputs, probe),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.fixture(autouse=True)
def no_sizes_are_few(monkeypatch):
    monkeypatch.setattr("metalora.nn.head._FEW", 0)


def test_few_outputs_are_computed_for_all_heads(shapes, monkeypatch):
    monkeypatch.setattr("metalora.nn.head._FEW", 6 * T * OUT)
    head, x = case()
    check(head, x, head(x, TaskBatch(torch.tensor(SORTED))), torch.tensor(SORTED))
    assert shapes == [(T * OUT, D)]


@pytest.fixture
def shapes(monkeypatch):
    """The shapes of the weights in all calls of F.linear."""
    seen, linear = [], F.linear

    def counted(x, weight, bias=None):
        seen.append(tuple(weight.shape))
        return linear(x, weight, bias)

    monkeypatch.setattr(F, "linear", counted)
    return seen


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("ids", [SORTED, MIXED], ids=str)
@pytest.mark.parametrize("inner", [(), (2,)])
def test_equally_many_rows_take_one_product(bias, ids, inner, shapes):
    head, x = case(bias, (6, *inner))
    ids = torch.tensor(ids)
    found = head(x, TaskBatch(ids))
    assert not shapes
    check(head, x, found, ids.repeat_interleave(2) if inner else ids)


def test_packed_rows_may_be_equally_many(shapes):
    head, x = case(rows=(1, 9))
    found = head(x, TaskBatch(torch.tensor([0, 1, 1, 2]), lengths=(3, 1, 2, 3)))
    assert not shapes
    check(head, x, found, torch.arange(3).repeat_interleave(3))


@pytest.mark.parametrize("limit", [6 * OUT, 6 * OUT - 1])
def test_other_rows_are_multiplied_by_all_heads_up_to_a_limit(limit, shapes, monkeypatch):
    monkeypatch.setattr("metalora.nn.head._PER_HEAD", limit)
    head, x = case()
    found = head(x, TaskBatch(torch.tensor(RAGGED)))
    assert shapes == ([(T * OUT, D)] if limit == 6 * OUT else [(OUT, D)] * T)
    check(head, x, found, torch.tensor(RAGGED))


@pytest.mark.parametrize("limit", [None, 0])
def test_a_row_that_is_not_finite_is_of_its_own_task_alone(limit, monkeypatch):
    """With equally many rows, and task by task."""
    ids = torch.tensor(SORTED if limit is None else RAGGED)
    if limit is not None:
        monkeypatch.setattr("metalora.nn.head._PER_HEAD", limit)
    head, x = case()
    x.data[-1] = torch.inf  # of task 2
    head(x, TaskBatch(ids))[ids < 2].sum().backward()
    assert head.weight.grad[:2].isfinite().all()


def test_ids_on_a_device_are_not_waited_for():
    ids = torch.zeros(4, dtype=torch.int64, device="meta")
    assert TaskBatch(torch.zeros(4, dtype=torch.int64)).counts_known(T)
    assert TaskBatch(ids, counts=[4]).counts_known(T)
    assert not TaskBatch(ids).counts_known(T)


@pytest.mark.parametrize("ids", [SORTED, RAGGED], ids=str)
def test_compiled_heads_of_a_vocabulary_are_computed_one_at_a_time(ids, monkeypatch):
    sizes = []

    def backend(graph, inputs):
        class Sized(torch.fx.Interpreter):
            def run_node(self, node):
                result = super().run_node(node)
                sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
                return result

        return lambda *arguments: Sized(graph).run(*arguments)

    monkeypatch.setattr("metalora.nn.head._VOCABULARY", OUT - 1)
    head, x = case(rows=(6, 4))
    ids = torch.tensor(ids)
    with tasks(ids):
        found = torch.compile(head, backend=backend, fullgraph=True)(x)
    assert max(sizes) == found.numel()
    check(head, x, found, ids.repeat_interleave(4))


def test_half_precision_under_autocast():
    head, x = case()
    head, x = head.float(), x.detach().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(x, TaskBatch(torch.tensor(SORTED)))
        wanted = nn.functional.linear(x[:2], head.weight[0], head.bias[0])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[:2], wanted)
