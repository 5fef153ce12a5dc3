from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from metalora import ops, reference
from metalora._library import native_available
from metalora.ops.route import takes_small_kernels
from tests.ops.problems import SIZES, SPLITS, Problem, oracle, problem, relative_error
from tests.pairs import every_pair

ROUTES = ["token", "weight", "reference", "auto"] if native_available() else ["reference", "auto"]
NATIVE = [route for route in ROUTES if route in ("token", "weight")]


def run(p: Problem, route: str, **options: object) -> list[Tensor]:
    """y and all gradients for a fixed random gradient of y."""
    y = ops.lora_linear(*p.tensors, p.task_ptr, route=route, **options)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype)
    return [y, *torch.autograd.grad(y, p.leaves, grad_y)]


def run_oracle(p: Problem, scaling: float, **options: object) -> list[Tensor]:
    y = oracle(p, scaling, **options)
    generator = torch.Generator().manual_seed(1)
    grad_y = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return [y, *torch.autograd.grad(y, p.leaves, grad_y)]


@every_pair(route=ROUTES, sizes=SIZES, split=SPLITS)
def test_agrees_with_einsum(route: str, sizes: tuple[int, int, int], split: str) -> None:
    p = problem(SPLITS[split], sizes)
    for got, wanted in zip(run(p, route, scaling=0.7), run_oracle(p, 0.7), strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("route", ROUTES)
def test_without_bias(route: str) -> None:
    p = problem(bias=False)
    for got, wanted in zip(run(p, route, scaling=2.0), run_oracle(p, 2.0), strict=True):
        assert relative_error(got, wanted) < 1e-12


@pytest.mark.parametrize("route", [r for r in ROUTES if r != "weight"])
@pytest.mark.parametrize("in_features", [3, 4, 33, 130])
def test_dropout_uses_the_documented_mask(route: str, in_features: int) -> None:
    p = problem((5, 0, 30), (in_features, 6, 2))
    keep = reference.dropout_mask(torch.tensor(77), 0.4, 35, in_features)
    assert 0 < keep.sum() < keep.numel()
    got = run(p, route, scaling=0.5, dropout_p=0.4, seed=77)
    for value, wanted in zip(got, run_oracle(p, 0.5, keep=keep, drop_p=0.4), strict=True):
        assert relative_error(value, wanted) < 1e-12


def test_seed_none_follows_torch_manual_seed() -> None:
    p = problem(grad=False)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ops.lora_linear(*p.tensors, p.task_ptr, dropout_p=0.5)

    assert torch.equal(draw(3), draw(3))
    assert not torch.equal(draw(3), draw(4))


@every_pair(
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    route=[(route, 0.0) for route in NATIVE] + [("token", 0.3)] * bool(NATIVE),
    sizes=[(10, 10, 1), (65, 40, 9), (256, 96, 8), (35, 33, 131)],
)
def test_rounds_no_worse_than_pytorch(
    route: tuple[str, float], dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    route, dropout_p = route
    options = {"scaling": 0.5, "dropout_p": dropout_p, "seed": 7}
    short = problem((40, 0, 33, 7), sizes, dtype=dtype)
    exact = problem((40, 0, 33, 7), sizes, grad=False)
    for to, source in zip(exact.leaves, short.leaves, strict=True):
        to.copy_(source.detach())
        to.requires_grad_()
    wanted = run(exact, "reference", **options)
    plain = run(short, "reference", **options)
    floor = torch.finfo(dtype).eps
    for got, by_torch, truth in zip(run(short, route, **options), plain, wanted, strict=True):
        assert got.dtype == dtype
        allowed = 2 * relative_error(by_torch, truth) + floor
        assert relative_error(got, truth) <= allowed


# Of five inputs: each alone, all but one, and all.
SUBSETS = [*(1 << i for i in range(5)), *(31 - (1 << i) for i in range(5)), 31]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("mask", SUBSETS)
def test_gradcheck_for_subsets_of_the_inputs(route: str, mask: int) -> None:
    p = problem((3, 0, 4), (3, 4, 2), grad=False)
    for i, leaf in enumerate(p.leaves):
        leaf.requires_grad_(bool(mask >> i & 1))

    def function(*tensors: Tensor) -> Tensor:
        return ops.lora_linear(*tensors, p.task_ptr, scaling=0.5, route=route)

    assert torch.autograd.gradcheck(function, p.leaves)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradgradcheck(route: str, dropout_p: float) -> None:
    if route == "weight" and dropout_p:
        pytest.skip("the weight route has no dropout")
    p = problem((3, 0, 4), (3, 4, 2))

    def function(*tensors: Tensor) -> Tensor:
        return ops.lora_linear(
            *tensors, p.task_ptr, scaling=0.5, dropout_p=dropout_p, seed=9, route=route
        )

    assert torch.autograd.gradcheck(function, p.leaves)
    assert torch.autograd.gradgradcheck(function, p.leaves)


@pytest.mark.parametrize("route", ROUTES)
def test_strided_inputs_are_handled_and_left_alone(route: str) -> None:
    p = problem(sizes=(8, 6, 2))
    wanted = run(p, route, scaling=0.5)
    storage = torch.randn(p.x.shape[0], 17, dtype=torch.float64)
    storage[:, 1::2] = p.x.detach()
    strided = Problem(
        storage[:, 1::2].requires_grad_(),
        p.weight.detach().t().contiguous().t().requires_grad_(),
        p.bias,
        p.lora_A.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        p.lora_B.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        p.task_ptr,
        p.rows,
    )
    assert not any(
        t.is_contiguous() for t in (strided.x, strided.weight, strided.lora_A, strided.lora_B)
    )
    before = [t.detach().clone() for t in strided.leaves]
    for got, want in zip(run(strided, route, scaling=0.5), wanted, strict=True):
        assert relative_error(got, want) < 1e-13
    assert all(torch.equal(t, b) for t, b in zip(strided.leaves, before, strict=True))


@pytest.mark.parametrize("route", ROUTES)
def test_strided_task_ptr(route: str) -> None:
    p = problem()
    wanted = ops.lora_linear(*p.tensors, p.task_ptr, route=route)
    strided = torch.stack([p.task_ptr, p.task_ptr + 1], dim=1)[:, 0]
    assert not strided.is_contiguous()
    assert torch.equal(ops.lora_linear(*p.tensors, strided, route=route), wanted)


@pytest.mark.parametrize("route", NATIVE)
def test_expanded_and_misaligned_gradients(route: str) -> None:
    p = problem()
    y = ops.lora_linear(*p.tensors, p.task_ptr, route=route)
    expanded = torch.autograd.grad(y, p.leaves, torch.ones((), dtype=y.dtype).expand_as(y))
    odd = torch.ones(y.numel() + 1, dtype=y.dtype)[1:].view_as(y)
    y = ops.lora_linear(*p.tensors, p.task_ptr, route=route)
    for a, b in zip(expanded, torch.autograd.grad(y, p.leaves, odd), strict=True):
        assert torch.equal(a, b)


@every_pair(
    bad=[float("nan"), float("inf")],
    route=ROUTES,
    sizes=[(10, 10, 1), (65, 40, 9)],
)
def test_nan_and_inf_stay_in_their_task(
    route: str, bad: float, sizes: tuple[int, int, int]
) -> None:
    p = problem((70, 66, 9), sizes)
    with torch.no_grad():
        p.x[100] = bad
    y, grad_x, _, _, grad_A, grad_B = run(p, route, scaling=0.5)
    task = slice(70, 136)
    for value in (y, grad_x):
        assert value[:70].isfinite().all() and value[136:].isfinite().all()
    assert not y[100].isfinite().any() and y[task][:30].isfinite().all()
    for value in (grad_A, grad_B):
        assert value[[0, 2]].isfinite().all() and not value[1].isfinite().all()


@pytest.mark.parametrize("route", NATIVE)
@pytest.mark.parametrize("sizes", [(10, 10, 1), (65, 40, 9)], ids=str)
def test_bits_repeat_whatever_the_threads(route: str, sizes: tuple[int, int, int]) -> None:
    p = problem((700, 1, 950), sizes, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(p, route, scaling=0.5))
    finally:
        torch.set_num_threads(threads)
    # Products of the size of W belong to the BLAS, which promises nothing across thread counts.
    ours = range(6) if max(sizes) <= 32 else (3, 4, 5) if route == "token" else ()
    for other in results[1:]:
        for i in ours:
            assert torch.equal(results[0][i], other[i])
    again = run(p, route, scaling=0.5)
    assert all(torch.equal(a, b) for a, b in zip(again, run(p, route, scaling=0.5), strict=True))


@pytest.mark.parametrize("route", NATIVE)
@pytest.mark.parametrize("sizes", [(10, 10, 1), (65, 40, 9)], ids=str)
def test_every_element_is_written(route: str, sizes: tuple[int, int, int]) -> None:
    """torch.empty hands out memory full of NaN here, so an element left out would show."""
    p = problem((5, 0, 71, 14), sizes)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        assert all(t.isfinite().all() for t in run(p, route, scaling=0.5))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("route", ROUTES)
def test_autocast(route: str) -> None:
    p = problem((9, 0, 20), (48, 40, 4), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(*p.tensors, p.task_ptr, scaling=0.5, route=route)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, p.leaves, torch.ones_like(y))
    assert all(g.dtype == torch.float32 for g in gradients)
    y_exact, *exact = run(p, "reference", scaling=0.5)
    exact = torch.autograd.grad(
        ops.lora_linear(*p.tensors, p.task_ptr, scaling=0.5, route="reference"),
        p.leaves,
        torch.ones_like(y_exact),
    )
    assert relative_error(y, y_exact) < 1e-2
    for got, wanted in zip(gradients, exact, strict=True):
        assert relative_error(got, wanted) < 1e-2


@pytest.mark.parametrize("route", ROUTES)
def test_double_backward_under_autocast(route: str) -> None:
    p = problem((9, 4), (40, 33, 2), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.lora_linear(*p.tensors, p.task_ptr, scaling=0.5, route=route)
    first = torch.autograd.grad(y.float().square().sum(), p.leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), p.leaves)
    y = ops.lora_linear(*p.tensors, p.task_ptr, scaling=0.5, route="reference")
    first = torch.autograd.grad(y.square().sum(), p.leaves, create_graph=True)
    exact = torch.autograd.grad(sum(g.square().sum() for g in first), p.leaves)
    for got, wanted in zip(second, exact, strict=True):
        assert relative_error(got, wanted) < 5e-2


def test_weight_route_keeps_small_adapters_of_float32_weights_under_autocast(native: None) -> None:
    """Rounding W + BA once must lose no more than plain autocast does."""
    p = problem((300,), (96, 96, 4), dtype=torch.float32, grad=False)
    p.lora_B.mul_(1e-3)
    exact = oracle(p, 1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_route = {
            route: ops.lora_linear(*p.tensors, p.task_ptr, route=route)
            for route in ("weight", "reference")
        }
    errors = {route: relative_error(y, exact) for route, y in by_route.items()}
    assert errors["weight"] < 2 * errors["reference"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_kept_merged_weights_change_no_bit(dtype: torch.dtype) -> None:
    """Kept or made again, W_t is the same; kept, it is made once."""
    p = problem(
        (9, 0, 20), (70, 40, 4), dtype=torch.float64 if dtype.itemsize > 4 else torch.float32
    )
    enabled = dtype == torch.bfloat16
    results = []
    for keep in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = ops.lora_linear(*p.tensors, p.task_ptr, route="weight", keep_merged=keep)
        results.append([y, *torch.autograd.grad(y, p.leaves, torch.ones_like(y))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_kept_merged_weights_are_used(native: None) -> None:
    p = problem((9, 20), (70, 40, 4))
    y = ops.lora_linear(*p.tensors, p.task_ptr, route="weight", keep_merged=True)
    kept = y.grad_fn.saved_tensors[-1]
    assert kept.shape == (2, 40, 70)
    before = torch.autograd.grad(y.sum(), p.x, retain_graph=True)[0]
    kept.data.mul_(2)
    after = torch.autograd.grad(y.sum(), p.x)[0]
    torch.testing.assert_close(after, 2 * before)


@pytest.mark.slow
def test_torch_compile_fullgraph_without_recompiling(native: None) -> None:
    recompiles = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    compiled = torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager", dynamic=True)
    before = recompiles["unique_graphs"]
    for rows in ((5, 0, 31), (9, 20, 2), (40, 40, 40)):
        p = problem(rows, (40, 40, 2))
        y = compiled(*p.tensors, p.task_ptr, scaling=0.5, route="token")
        torch.testing.assert_close(y, oracle(p, 0.5))
        grads = torch.autograd.grad(y.sum(), p.leaves)
        wanted = torch.autograd.grad(oracle(p, 0.5).sum(), p.leaves)
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want)
    assert recompiles["unique_graphs"] == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(10, 10, 1), (40, 33, 3), (70, 33, 3)], ids=str)
def test_opcheck(native: None, sizes: tuple[int, int, int]) -> None:
    raw, check = torch.ops.metalora, torch.library.opcheck
    p = problem((5, 0, 31), sizes, dtype=torch.float32, grad=False)
    x, weight, _, lora_A, lora_B = p.tensors
    inputs = (*p.tensors, p.task_ptr, 0.5)
    saved = (torch.randn(36, sizes[1]), x, weight, lora_A, lora_B, p.task_ptr)
    merged = ops.merge_lora(weight, lora_A, lora_B, 0.5)
    check(raw.lora_linear_weight.default, (*inputs, None, False))
    check(raw.lora_linear_weight.default, (*inputs, merged, False))
    for dropout in ((0.0, None, False), (0.3, torch.tensor(5), False)):
        check(raw.lora_linear_token.default, (*inputs, *dropout))
        kept = raw.lora_linear_token(*inputs, *dropout)[1:]
        for needs in ([True] * 5, [False, True, False, True, False], [False] * 5):
            for grad_x in (None, torch.randn_like(inputs[0])):
                given = (*saved, *kept, 0.5, *dropout, *needs, grad_x)
                check(raw.lora_linear_token_backward.default, given)
    for needs in ([True] * 5, [False, True, False, True, False], [False] * 5):
        check(raw.lora_linear_weight_backward.default, (*saved, 0.5, None, False, *needs))
        check(raw.lora_linear_weight_backward.default, (*saved, 0.5, merged, False, *needs))


def test_raw_operators_refuse_tensors_that_need_grad(native: None) -> None:
    p = problem()
    for name, rest in (
        ("lora_linear_weight", (None, False)),
        ("lora_linear_token", (0.0, None, False)),
    ):
        with pytest.raises(RuntimeError, match=r"has no autograd of its own; call .*metalora\.ops"):
            getattr(torch.ops.metalora, name)(*p.tensors, p.task_ptr, 1.0, *rest)


@pytest.mark.parametrize("probability", [1.0, -0.1, math.nan, math.inf])
def test_raw_operators_check_the_probability(native: None, probability: float) -> None:
    p = problem(grad=False)
    with pytest.raises(RuntimeError, match=r"lora_linear: dropout_p must be in \[0, 1\), got"):
        torch.ops.metalora.lora_linear_token(
            *p.tensors, p.task_ptr, 1.0, probability, torch.tensor(5), False
        )


def test_raw_operators_check_the_seed(native: None) -> None:
    p = problem(grad=False)
    for seed in (torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(RuntimeError, match=r"lora_linear: seed must have 0 dimensions"):
            torch.ops.metalora.lora_linear_token(*p.tensors, p.task_ptr, 1.0, 0.5, seed, False)


@pytest.mark.parametrize("pointers", [[0, 5, 4, 7], [1, 2, 3, 7], [0, 2, 3, 9], [0, -3, 3, 7]])
def test_raw_operators_never_read_outside(native: None, pointers: list[int]) -> None:
    p = problem((2, 3, 2), grad=False)
    with pytest.raises(RuntimeError, match=r"lora_linear: task_ptr must"):
        torch.ops.metalora.lora_linear_weight(*p.tensors, torch.tensor(pointers), 1.0, None, False)


def test_switching_native_off_changes_what_runs(native: None, monkeypatch) -> None:
    """Shows that the native kernels are really used: without them they are not called."""
    called = []
    module = __import__("sys").modules["metalora.ops.lora_linear"]
    original = module.call
    monkeypatch.setattr(module, "call", lambda name, *a: called.append(name) or original(name, *a))
    p = problem()
    ops.lora_linear(*p.tensors, p.task_ptr).sum().backward()
    assert called == ["lora_linear_weight", "lora_linear_weight_backward"]
    called.clear()
    monkeypatch.setattr(module, "usable", lambda tensor: False)
    ops.lora_linear(*p.tensors, p.task_ptr).sum().backward()
    assert called == []


class TestRoutes:
    def choose(self, **changes: object) -> ops.RouteChoice:
        arguments = {
            "rows": 4000,
            "tasks": 4,
            "in_features": 96,
            "out_features": 96,
            "dropout_p": 0.0,
            "dtype": torch.float32,
            "device_type": "cpu",
        }
        return ops.choose_route(**(arguments | changes))

    def test_many_rows_take_the_weight_route(self) -> None:
        assert self.choose().route == "weight"

    @pytest.mark.parametrize(
        ("change", "route", "reason"),
        [
            ({"rows": 8}, "token", "no more than"),
            ({"dropout_p": 0.1}, "token", "dropout"),
            ({"dtype": torch.bfloat16}, "token", "rounded"),
            ({"dtype": torch.bfloat16, "weight_dtype": torch.float32}, "weight", "more than"),
            ({"rows": 8, "in_features": 64, "out_features": 64}, "weight", "more than 0"),
            ({"in_features": 64, "out_features": 64, "tasks": 50}, "weight", "more than 2444"),
            ({"in_features": 64, "out_features": 64, "tasks": 100}, "token", "no more than 5289"),
            ({"in_features": 64, "out_features": 10, "tasks": 100}, "weight", "more than 1014"),
            (
                {"in_features": 32, "out_features": 32, "tasks": 200, "dtype": torch.float64},
                *("weight", "more than 3220"),
            ),
            ({"rows": 8, "in_features": 33, "dtype": torch.float64}, "token", "no more than"),
            ({"problem": "the library is away"}, "reference", "the library is away"),
            ({"device_type": "mps"}, "reference", "no native kernels for mps tensors"),
        ],
    )
    def test_each_argument_matters(self, change: dict, route: str, reason: str) -> None:
        choice = self.choose(**change)
        assert choice.route == route
        assert reason in choice.reason

    @pytest.mark.parametrize(
        ("change", "route", "reason"),
        [
            ({}, "weight", "4000 rows for 4 tasks are more than 768"),
            ({"rows": 768}, "token", "768 rows for 4 tasks are no more than 768"),
            ({"dropout_p": 0.1}, "token", "dropout"),
            ({"dtype": torch.bfloat16}, "token", "rounded to torch.bfloat16"),
            ({"dtype": torch.bfloat16, "weight_dtype": torch.float32}, "weight", "more than"),
            ({"rows": 768, "in_features": 24}, "weight", "more than 384"),
            ({"memory": 4 * 96 * 96 * 8}, "weight", "more than"),
            ({"memory": 4 * 96 * 96 * 8 - 1}, "token", "4 merged weights and gradients"),
            ({"tasks": 50000, "memory": 10**9}, "token", "would take 3.7 GB"),
            ({"problem": "the library is away"}, "reference", "the library is away"),
        ],
    )
    def test_each_argument_matters_on_a_gpu(self, change: dict, route: str, reason: str) -> None:
        choice = self.choose(**({"device_type": "cuda"} | change))
        assert choice.route == route
        assert reason in choice.reason

    @every_pair(
        sizes=[(64, 64), (32, 20), (8, 8), (1, 1), (0, 0), (65, 4)],
        tasks=[0, 1, 8, 30],
        rows=[0, 1, 30, 100, 300, 1000, 3000],
        dtype=[torch.float32, torch.float64, torch.bfloat16],
    )
    def test_the_quick_question_has_the_same_answer(self, sizes, tasks, rows, dtype) -> None:
        x, weight = torch.empty(rows, sizes[0], dtype=dtype), torch.empty(*sizes[::-1], dtype=dtype)
        task_ptr, lora_A = torch.zeros(tasks + 1), torch.empty(tasks, 2, sizes[0], dtype=dtype)
        route = ops.lora_linear_route(x, weight, lora_A).route
        small = max(sizes) <= {torch.float32: 64, torch.float64: 32}.get(dtype, -1)
        assert takes_small_kernels(x, weight, task_ptr) == (small and route == "weight")

    @every_pair(
        sizes=SIZES,
        rows=[(4, 4), (900, 800)],
        dropout_p=[0.0, 0.2],
    )
    def test_auto_takes_what_it_says(self, monkeypatch, sizes, rows, dropout_p) -> None:
        p = problem(rows, sizes)
        choice = ops.lora_linear_route(p.x, p.weight, p.lora_A, dropout_p=dropout_p)
        module = __import__("sys").modules["metalora.ops.lora_linear"]
        taken = []
        original = module.call
        monkeypatch.setattr(module, "call", lambda *a: taken.append(a[0]) or original(*a))
        ops.lora_linear(*p.tensors, p.task_ptr, dropout_p=dropout_p)
        assert taken == ([] if choice.route == "reference" else [f"lora_linear_{choice.route}"])


def test_torch_func_on_the_reference_route() -> None:
    p = problem(grad=False)

    def loss(weight: Tensor) -> Tensor:
        y = ops.lora_linear(p.x, weight, p.bias, p.lora_A, p.lora_B, p.task_ptr, route="reference")
        return y.square().sum()

    wanted = torch.autograd.functional.jacobian(loss, p.weight)
    torch.testing.assert_close(torch.func.grad(loss)(p.weight), wanted)
