"""`lora_linear` by the CUDA operators, on a GPU and through the shim."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from metalora import ops
from metalora.nn import MultiTaskLoRALinear, SymmetricLoRALinear, TaskBatch, shared_input, tasks
from tests.cuda.places import Calls
from tests.ops.problems import SPLITS, Problem, oracle, problem, relative_error
from tests.pairs import every_pair

pytestmark = pytest.mark.slow

ROUTES = ("weight", "token")
SIZES = ((1, 1, 1), (7, 5, 3), (16, 24, 1), (33, 40, 17))  # in, out, rank
SHORT = (torch.bfloat16, torch.float16)


def moved(p: Problem, device: torch.device, dtype: torch.dtype | None = None) -> Problem:
    """The problem on another device and in another dtype; its task_ptr stays on the host."""
    made = copy.copy(p)
    for name in ("x", "weight", "bias", "lora_A", "lora_B"):
        tensor = getattr(p, name)
        if tensor is not None:
            tensor = tensor.detach().to(device, dtype).requires_grad_(tensor.requires_grad)
        setattr(made, name, tensor)
    return made


def run(p: Problem, route: str, grad_y: Tensor | None = None, **settings: object) -> list[Tensor]:
    """y and the gradients of all inputs, on the CPU."""
    y = ops.lora_linear(*p.tensors, p.task_ptr, route=route, **settings)
    grad_y = torch.ones_like(y) if grad_y is None else grad_y.to(y)
    return [t.cpu() for t in (y, *torch.autograd.grad(y, p.leaves, grad_y))]


def exact(p: Problem, grad_y: Tensor, scaling: float) -> list[Tensor]:
    p = moved(p, torch.device("cpu"), torch.float64)
    y = oracle(p, scaling)
    return [y, *torch.autograd.grad(y, p.leaves, grad_y.double())]


@every_pair(split=SPLITS, sizes=SIZES, route=ROUTES, bias=[True, False])
def test_agrees_with_the_oracle(
    device: torch.device, split: str, sizes: tuple[int, int, int], route: str, bias: bool
) -> None:
    p = problem(SPLITS[split], sizes, bias=bias)
    grad_y = torch.randn(sum(p.rows), sizes[1], dtype=torch.float64)
    for got, wanted in zip(
        run(moved(p, device), route, grad_y, scaling=0.7), exact(p, grad_y, 0.7), strict=True
    ):
        assert got.shape == wanted.shape
        assert relative_error(got, wanted) < 1e-12


@every_pair(
    route=ROUTES,
    sizes=[(40, 24, 3), (64, 72, 24), (33, 40, 17)],
    split=["equal", "ragged"],
    dtype=[torch.float32, *SHORT],
)
def test_short_dtypes_err_as_plain_pytorch_does(
    device: torch.device, dtype: torch.dtype, split: str, sizes: tuple[int, int, int], route: str
) -> None:
    p = moved(problem(SPLITS[split], sizes), device, dtype)
    grad_y = torch.randn(sum(p.rows), sizes[1], dtype=dtype)
    plain = run(p, "reference", grad_y, scaling=0.7)
    for got, usual, wanted in zip(
        run(p, route, grad_y, scaling=0.7), plain, exact(p, grad_y, 0.7), strict=True
    ):
        assert got.dtype == dtype
        allowed = 2 * relative_error(usual, wanted) + 2 * torch.finfo(dtype).eps
        assert relative_error(got, wanted) < allowed


@every_pair(
    bias=[True, False],
    route=ROUTES,
    split=["equal", "ragged", "no_rows"],
    dtype=SHORT,
)
def test_autocast(
    device: torch.device, dtype: torch.dtype, split: str, route: str, bias: bool
) -> None:
    """Ragged rows without a bias take torch's grouped product in bfloat16."""
    p = moved(problem(SPLITS[split], (64, 40, 4), bias=bias), device, torch.float32)
    grad_y = torch.randn(sum(p.rows), 40)
    results = {}
    for name in (route, "reference"):
        with torch.autocast(device.type, dtype=dtype):
            results[name] = run(p, name, grad_y, scaling=0.7)
    assert results[route][0].dtype == dtype
    assert all(g.dtype == torch.float32 for g in results[route][1:])
    for got, usual, wanted in zip(
        results[route], results["reference"], exact(p, grad_y, 0.7), strict=True
    ):
        allowed = 2 * relative_error(usual, wanted) + 2 * torch.finfo(dtype).eps
        assert relative_error(got, wanted) <= allowed


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_of_the_parameters_are_not_rounded_under_autocast(
    device: torch.device, route: str
) -> None:
    """The weight route sums dYᵀX in float: its dW is closer than any rounded to 16 bits."""
    p = moved(problem((64, 64), (32, 32, 2)), device, torch.float32)
    grad_y = torch.randn(128, 32).bfloat16()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        _, _, grad_weight, *_ = run(p, route, grad_y)
    wanted = grad_y.double().T @ p.x.detach().cpu().bfloat16().double()
    error = relative_error(grad_weight, wanted)
    assert error < 1e-6 if route == "weight" else 1e-4 < error < 1e-2


@every_pair(
    split=["equal", "ragged", "one_row", "no_rows"],
    dropout_p=[0.1, 0.9],
    sizes=[(7, 5, 3), (40, 24, 4)],
)
def test_dropout_is_that_of_the_reference(
    device: torch.device, sizes: tuple[int, int, int], dropout_p: float, split: str
) -> None:
    p = problem(SPLITS[split], sizes)
    settings = {"scaling": 0.7, "dropout_p": dropout_p, "seed": 11}
    wanted = run(p, "reference", **settings)
    for got, want in zip(run(moved(p, device), "token", **settings), wanted, strict=True):
        assert relative_error(got, want) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [(6, 6), (5, 0, 9)], ids=str)
def test_every_subset_of_gradients(device: torch.device, rows: tuple[int, ...], route: str) -> None:
    p = moved(problem(rows), device)
    every = run(p, route)[1:]
    for mask in range(1, 32):
        for i, leaf in enumerate(p.leaves):
            leaf.requires_grad_(bool(mask >> i & 1))
        y = ops.lora_linear(*p.tensors, p.task_ptr, route=route)
        y.backward(torch.ones_like(y))
        for leaf, wanted in zip(p.leaves, every, strict=True):
            assert (leaf.grad is not None) == leaf.requires_grad
            if leaf.grad is not None:
                assert torch.equal(leaf.grad.cpu(), wanted)
            leaf.grad = None


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [(3, 3), (2, 0, 3)], ids=str)
def test_gradcheck_and_gradgradcheck(
    device: torch.device, rows: tuple[int, ...], route: str
) -> None:
    p = moved(problem(rows, (3, 4, 2)), device)

    def layer(*leaves: Tensor) -> Tensor:
        return ops.lora_linear(*leaves, p.task_ptr, scaling=0.5, route=route)

    assert torch.autograd.gradcheck(layer, p.leaves)
    assert torch.autograd.gradgradcheck(layer, p.leaves)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [(5, 5, 5), (5, 4, 6)], ids=str)
def test_a_broken_task_breaks_no_other(
    device: torch.device, rows: tuple[int, ...], route: str
) -> None:
    p = moved(problem(rows, (7, 5, 3)), device)
    healthy = run(p, route)
    start, end = p.task_ptr[1:3].tolist()
    for name in ("x", "lora_A", "lora_B"):
        broken = moved(p, device)
        with torch.no_grad():
            tensor = getattr(broken, name)
            tensor[slice(start, end) if name == "x" else 1] = float("nan")
        y, grad_x, _, _, grad_A, grad_B = run(broken, route)
        assert y[start:end].isnan().all()
        for got, want in ((y, healthy[0]), (grad_x, healthy[1])):
            assert torch.equal(got[:start], want[:start])
            assert torch.equal(got[end:], want[end:])
        for got, want in ((grad_A, healthy[4]), (grad_B, healthy[5])):
            assert torch.equal(got[[0, 2]], want[[0, 2]])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("rows", [(9, 9), (5, 0, 9)], ids=str)
def test_repeats_bit_for_bit_and_writes_everything(
    device: torch.device, rows: tuple[int, ...], route: str
) -> None:
    p = moved(problem(rows, (33, 40, 5), dtype=torch.float32), device)
    before = [leaf.detach().clone() for leaf in p.leaves]
    first = run(p, route)
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty hands out NaN
    try:
        second = run(p, route)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, p.leaves, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_strides_of_any_kind(device: torch.device, route: str) -> None:
    p = moved(problem((5, 0, 9), (33, 40, 5)), device)
    strided = copy.copy(p)
    for name in ("x", "weight", "lora_A", "lora_B"):
        tensor = getattr(p, name).detach()
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        wide = wide.to(device)
        wide[..., 1::2] = tensor
        setattr(strided, name, wide[..., 1::2].requires_grad_())
    strided.weight = p.weight.detach().t().contiguous().t().requires_grad_()
    grad_y = torch.ones((), dtype=torch.float64).expand(14, 40)
    for got, wanted in zip(run(strided, route, grad_y), run(p, route, grad_y), strict=True):
        assert relative_error(got, wanted) < 1e-12


def test_misaligned_rows_take_no_grouped_product(
    shim_operators: Any, asked: Callable[[], list[tuple[str, tuple[int, ...]]]]
) -> None:
    """torch refuses grouped products of rows that do not begin at a multiple of 16 bytes."""
    weight, lora_A, lora_B = torch.randn(16, 24), torch.randn(2, 3, 24), torch.randn(2, 16, 3)
    task_ptr, needs = torch.tensor([0, 5, 14]), (True, False, False, False, False)
    memory, grads = torch.randn(14 * 24 + 1).bfloat16(), torch.randn(14 * 16 + 1).bfloat16()
    found = {}
    for first, names in ((0, ("grouped", "grouped")), (1, ("linear", "addmm"))):
        x = memory[first : first + 14 * 24].view(14, 24)
        grad_y = grads[first : first + 14 * 16].view(14, 16)
        layer = (weight, lora_A, lora_B, task_ptr, 0.7)
        asked()
        y = shim_operators.lora_linear_weight(x, weight, None, *layer[1:], None, False)
        forward = [name for name, _ in asked()]
        gradients = shim_operators.lora_linear_weight_backward(
            grad_y, x, *layer, None, False, *needs
        )
        assert names[0] in forward and names[1] in [name for name, _ in asked()]
        found[first] = (x, y, grad_y, gradients[0])
    for x, y, grad_y, grad_x in found.values():
        merged = (weight + 0.7 * lora_B @ lora_A).bfloat16().float()
        for t, rows in enumerate((slice(0, 5), slice(5, 14))):
            torch.testing.assert_close(
                y[rows].float(), x[rows].float() @ merged[t].T, rtol=2e-2, atol=5e-2
            )
            torch.testing.assert_close(
                grad_x[rows].float(), grad_y[rows].float() @ merged[t], rtol=2e-2, atol=5e-2
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [(512, 512), (5, 0, 66)], ids=str)
@pytest.mark.parametrize(
    "out", [16, 17, 18]
)  # sums; no algorithm; refused: see tests/shim/blas.cpp
def test_the_gradient_of_the_bias_comes_with_the_products(
    shim_operators: Any,
    asked: Callable[[], list[tuple[str, tuple[int, ...]]]],
    rows: tuple[int, ...],
    dtype: torch.dtype,
    out: int,
) -> None:
    """Rounded once: no worse than a sum of its own, which there is where cuBLASLt has none."""
    tasks, total = len(rows), sum(rows)
    x, grad_y = torch.randn(total, 24).to(dtype), torch.randn(total, out).to(dtype)
    weight, lora_A = torch.randn(out, 24), torch.randn(tasks, 3, 24)
    lora_B, task_ptr = torch.randn(tasks, out, 3), torch.tensor([0, *rows]).cumsum(0)
    layer = (x, weight, lora_A, lora_B, task_ptr, 0.7, None, False)
    asked()
    found = shim_operators.lora_linear_weight_backward(grad_y, *layer, *[True] * 5)
    names = [name for name, _ in asked()]
    products = 1 if len({*rows}) == 1 else 2
    assert names.count("summed") == (products if out == 16 else 0)
    assert names.count("sum") == 1
    wanted = grad_y.double().sum(0)
    assert found[2].dtype == dtype
    assert relative_error(found[2], wanted) <= 2 * torch.finfo(dtype).eps
    exact = grad_y.double().T @ x.double()
    assert relative_error(found[1], exact) < 1e-5


@pytest.mark.parametrize("tasks", [600, pytest.param(1030, marks=pytest.mark.exhaustive)])
def test_more_tasks_than_a_launch_or_a_grouped_product_holds(
    device: torch.device, tasks: int
) -> None:
    rows = tuple(t % 3 for t in range(tasks))
    p = moved(problem(rows, (8, 8, 1), bias=False), device, torch.float32)
    grad_y = torch.randn(sum(rows), 8)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        results = run(p, "weight", grad_y)
    for got, wanted in zip(results, exact(p, grad_y, 1.0), strict=True):
        assert relative_error(got, wanted) < 1e-2


def test_kept_merged_weights_change_no_bit(device: torch.device) -> None:
    p = moved(problem((9, 0, 20), (40, 24, 4)), device, torch.float32)
    results = []
    for keep in (False, True):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            results.append(run(p, "weight", keep_merged=keep))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_merged_weights_are_made_again_unless_kept(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = moved(problem((9, 20), (40, 24, 4)), device)
    y = ops.lora_linear(*p.tensors, p.task_ptr, route="weight")
    saved = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
    assert saved == {t.data_ptr() for t in (p.x, p.weight, p.lora_A, p.lora_B, p.task_ptr)}
    calls = Calls(monkeypatch)
    run(p, "weight", keep_merged=True)
    assert calls.names == ["merge_lora", "lora_linear_weight", "lora_linear_weight_backward"]


@pytest.mark.parametrize("route", ROUTES)
def test_activation_checkpointing(device: torch.device, route: str) -> None:
    p = moved(problem((6, 6), (16, 8, 2)), device)
    settings = {"route": route, "dropout_p": 0.0 if route == "weight" else 0.3, "seed": 5}

    def layer(*leaves: Tensor) -> Tensor:
        return ops.lora_linear(*leaves, p.task_ptr, **settings)

    y = checkpoint(layer, *p.leaves, use_reentrant=False)
    gradients = torch.autograd.grad(y, p.leaves, torch.ones_like(y))
    wanted = run(p, **settings)[1:]
    assert all(torch.equal(a.cpu(), b) for a, b in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_compiles_in_one_graph_for_all_row_counts(device: torch.device, route: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    for rows in ((5, 0, 31), (9, 20, 2), (12, 12, 12)):
        p = moved(problem(rows, (16, 24, 2)), device)
        y = compiled(*p.tensors, p.task_ptr, scaling=0.5, route=route)
        got = [y, *torch.autograd.grad(y, p.leaves, torch.ones_like(y))]
        wanted = run(p, route, scaling=0.5)
        assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))
    assert graphs["unique_graphs"] == before + 1


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("split", ["equal", "ragged"])
@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_symmetric_adapters(device: torch.device, split: str, scaling: float, keep: bool) -> None:
    p = problem(SPLITS[split], (24, 24, 3))
    grad_y = torch.randn(sum(p.rows), 24, dtype=torch.float64)
    lora_U = p.lora_B.detach().requires_grad_()

    def layer(*leaves: Tensor) -> Tensor:
        return ops.lora_linear_symmetric(
            *leaves, p.task_ptr, scaling=scaling, route="weight", keep_merged=keep
        )

    x, weight, bias, U = (t.detach().to(device).requires_grad_() for t in (*p.tensors[:3], lora_U))
    y = layer(x, weight, bias, U)
    got = [y, *torch.autograd.grad(y, (x, weight, bias, U), grad_y.to(device))]
    plain = (*p.tensors[:3], lora_U)
    y = ops.lora_linear(
        *plain[:3], lora_U.mT, lora_U, p.task_ptr, scaling=scaling, route="reference"
    )
    wanted = [y, *torch.autograd.grad(y, plain, grad_y)]
    for found, right in zip(got, wanted, strict=True):
        assert relative_error(found.cpu(), right) < 1e-12


def test_symmetric_adapters_are_not_copied(
    shim_operators: Any, asked: Callable[[], list[tuple[str, tuple[int, ...]]]]
) -> None:
    x, grad = torch.randn(2, 40, 16)
    weight, lora_U, task_ptr = torch.randn(16, 16), torch.randn(2, 16, 3), torch.tensor([0, 20, 40])
    y = shim_operators.lora_linear_symmetric(x, weight, None, lora_U, task_ptr, 0.7, None, False)
    assert [name for name, _ in asked()] == ["merge_kernel", "bmm"]
    merged = weight + 0.7 * lora_U @ lora_U.mT
    torch.testing.assert_close(y.view(2, 20, 16), x.view(2, 20, 16) @ merged.mT)
    given = (grad, x, weight, lora_U, task_ptr, 0.7, None, False)
    shim_operators.lora_linear_symmetric_backward(*given, *(True, True, False, True))
    names = [name for name, _ in asked()]
    assert names[:3] == ["merge_kernel", "baddbmm", "bmm"]
    assert names[3:] == ["prepare_kernel", "backward_kernel", "sum_kernel"]


def layers(device: torch.device) -> Iterator[torch.nn.Module]:
    for keep in (False, True):
        yield MultiTaskLoRALinear(24, 16, 3, 2, route="weight", keep_merged=keep, device=device)
    yield MultiTaskLoRALinear(24, 16, 3, 2, route="token", dropout=0.2, device=device)
    yield SymmetricLoRALinear(16, 3, 2, route="weight", device=device)


def test_layers_run_on_these_operators(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = TaskBatch(torch.tensor([2, 0, 0, 1, 2, 2]))
    for layer in layers(device):
        calls = Calls(monkeypatch)
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(6, 4, layer.in_features, device=device, requires_grad=True)
        layer.eval()
        y = layer(x, batch)
        y.sum().backward()
        name = "symmetric" if isinstance(layer, SymmetricLoRALinear) else layer.route
        assert {f"lora_linear_{name}", f"lora_linear_{name}_backward"} <= {*calls.names}
        for sample, task in enumerate(batch.task_ids.tolist()):
            wanted = layer.to_linear(task)(x[sample])
            torch.testing.assert_close(y[sample], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("ids", [(0, 0, 1, 1, 2, 2), (0, 0, 0, 2, 2, 2)], ids=["equal", "ragged"])
@pytest.mark.parametrize("autocast", [False, True])
def test_layers_that_read_the_same_input(
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
    ids: tuple[int, ...],
    autocast: bool,
) -> None:
    layers = [MultiTaskLoRALinear(24, 16 + 8 * i, 3, 2, route=route, device=device) for i in (0, 1)]
    for parameter in (p for layer in layers for p in layer.parameters()):
        torch.nn.init.normal_(parameter)
    leaf = torch.randn(6, 4, 24, device=device, requires_grad=True)
    found = []
    for shared in (True, False):
        monkeypatch.setattr(shared_input, "SHARING_DEVICES", [device.type] if shared else [])
        with tasks(torch.tensor(ids)), torch.autocast(device.type, torch.bfloat16, autocast):
            x = leaf * 1
            outputs = [layer(x) for layer in layers]
        total = sum(y.float().square().sum() for y in outputs)
        leaves = [leaf, *(p for layer in layers for p in layer.parameters())]
        assert isinstance(total, Tensor)
        found.append([*outputs, *torch.autograd.grad(total, leaves)])
    for got, wanted in zip(*found, strict=True):
        assert relative_error(got, wanted) < (1e-2 if autocast else 1e-5)


@pytest.mark.parametrize("pointers", [[0, 5, 4, 7], [1, 2, 3, 7], [0, 2, 3, 9], [0, -3, 3, 7]])
@pytest.mark.parametrize("route", ROUTES)
def test_wrong_pointers_are_named(device: torch.device, route: str, pointers: list[int]) -> None:
    p = moved(problem((2, 3, 2), grad=False), device)
    with pytest.raises(ValueError, match=r"lora_linear: task_ptr must"):
        ops.lora_linear(*p.tensors, torch.tensor(pointers), route=route)
