"""Layers that read the same tensor share what is made of it, and nothing else changes."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from metalora.nn import MultiTaskLoRALinear, SymmetricLoRALinear, TaskBatch, shared_input, tasks
from metalora.nn.lora_layer import LoRALayer
from tests.ops.problems import relative_error

EQUAL, RAGGED = (0, 0, 1, 1, 2, 2), (0, 0, 0, 2, 2, 2)
Run = Callable[[nn.ModuleDict, Tensor], list[Tensor]]


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Turns sharing on a CPU on or off."""

    def turn(on: bool) -> None:
        monkeypatch.setattr(shared_input, "SHARING_DEVICES", ["cpu"] if on else [])

    return turn


def projections(
    route: str = "auto", dropout: float = 0.0, *, bias: bool = True, dtype: Any = torch.float64
) -> nn.ModuleDict:
    """Of queries, keys and values: with different ranks and sizes."""
    torch.manual_seed(0)
    layers = {}
    for name, (outer, rank) in {"query": (40, 3), "key": (8, 1), "value": (8, 5)}.items():
        settings: dict[str, Any] = {"dropout": dropout, "route": route, "dtype": dtype}
        layers[name] = MultiTaskLoRALinear(36, outer, 3, rank, alpha=2.0, bias=bias, **settings)
        nn.init.normal_(layers[name].lora_B)
    return nn.ModuleDict(layers)


def called(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [layer(x) for layer in layers.values()]


def results(layers: nn.ModuleDict, ids: tuple[int, ...], run: Run = called) -> list[Tensor]:
    """The outputs and all gradients, of a leaf from which x is made as well."""
    torch.manual_seed(1)
    dtype = next(layers.parameters()).dtype
    leaf = torch.randn(len(ids), 4, 36, dtype=dtype, requires_grad=True)
    with tasks(torch.tensor(ids)):
        outputs = run(layers, leaf * 1)
    total = sum((y.double() * torch.randn(y.shape).double()).sum() for y in outputs)
    leaves = [leaf, *(p for p in layers.parameters() if p.requires_grad)]
    assert isinstance(total, Tensor)
    total.backward()
    gradients = [one.grad for one in leaves]
    layers.zero_grad()
    return [*outputs, *gradients]


def assert_equal(found: list[Tensor], wanted: list[Tensor], allowed: float = 1e-12) -> None:
    for got, right in zip(found, wanted, strict=True):
        assert (got is None) == (right is None)
        if right is not None:
            assert got.dtype == right.dtype and relative_error(got, right) <= allowed


@pytest.mark.parametrize("ids", [EQUAL, RAGGED, (1,) * 6, (0, 1, 0, 2, 1, 2)], ids=str)
@pytest.mark.parametrize(
    ("route", "dropout"),
    [("auto", 0.0), ("weight", 0.0), ("token", 0.0), ("token", 0.3), ("reference", 0.3)],
)
@pytest.mark.parametrize("bias", [True, False])
def test_equal_to_layers_on_their_own(sharing, ids, route, dropout, bias) -> None:
    layers = projections(route, dropout, bias=bias)
    found = []
    for on in (True, False):
        sharing(on)
        found.append(results(layers, ids))
    assert_equal(*found)


def frozen(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    for layer in layers.values():
        layer.weight.requires_grad_(False)
    return called(layers, x)


def one_plain(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    key = layers["key"]
    return [layers["query"](x), nn.functional.linear(x, key.weight), layers["value"](x)]


def one_not_used(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    layers["query"](x)
    return [layers["key"](x), layers["value"](x)]


def another_between(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [layers["query"](x), layers["key"](x + 1), layers["value"](x)]


def twice(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [*called(layers, x), *called(layers, x)]


def residual(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [*called(layers, x), x]


def mixed_routes(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    for layer, route in zip(layers.values(), ("weight", "token", "weight"), strict=True):
        layer.route = route
    return called(layers, x)


def without_gradient_between(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    first = layers["query"](x)
    with torch.no_grad():
        layers["key"](x)
    return [first, layers["value"](x)]


def reentrant(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [checkpoint(lambda x: torch.cat(called(layers, x), -1), x, use_reentrant=True)]


def not_reentrant(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    return [checkpoint(lambda x: torch.cat(called(layers, x), -1), x, use_reentrant=False)]


def hooked(layers: nn.ModuleDict, x: Tensor) -> list[Tensor]:
    """A backward hook makes torch give the layer another tensor; this one sees its gradient."""
    seen: list[Tensor] = []
    hook = layers["key"].register_full_backward_hook(lambda _, found, __: seen.append(found[0]))
    outputs = called(layers, x)
    (total,) = torch.autograd.grad(outputs[1].sum(), x, retain_graph=True)
    assert torch.equal(seen[0], total)
    hook.remove()
    return outputs


RUNS = (
    *(frozen, one_plain, one_not_used, another_between, twice, residual, mixed_routes),
    *(without_gradient_between, reentrant, not_reentrant, hooked),
)


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
@pytest.mark.parametrize("route", ["weight", "token"])
def test_whatever_happens_between_the_calls(sharing, run: Run, route: str) -> None:
    found = []
    for on in (True, False):
        sharing(on)
        found.append(results(projections(route), EQUAL, run))
    assert_equal(*found)


def test_one_cast_under_autocast(sharing) -> None:
    """As close to the gradients of float32 as three casts are, with two fewer each way."""
    layers = projections(dtype=torch.float32)
    casts, errors = [], []
    exact = results(layers.double(), EQUAL)
    layers.float()
    for on in (True, False):
        sharing(on)
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
            found = results(layers, EQUAL)
        casts.append(sum(event.name == "aten::_to_copy" for event in profile.events()))
        errors.append([relative_error(a, b) for a, b in zip(found, exact, strict=True)])
    assert casts[0] == casts[1] - 4
    for shared, alone in zip(*errors, strict=True):
        assert shared <= 1.5 * alone


@pytest.mark.parametrize(
    ("route", "ids", "products", "spared"),
    [
        *(("weight", EQUAL, 2, 2), ("token", EQUAL, 0, 2), ("token", RAGGED, 0, 2)),
        ("weight", RAGGED, 0, 0),
    ],
)
def test_gradients_are_not_added_by_autograd(sharing, route, ids, products, spared) -> None:
    additions = []
    for on in (True, False):
        sharing(on)
        with torch.profiler.profile() as profile:
            results(projections(route), ids)
        names = [event.name for event in profile.events()]
        added = names.count("aten::add") + names.count("aten::add_")
        additions.append((added, names.count("aten::baddbmm_")))
    (shared, in_products), (alone, none) = additions
    assert (in_products, none) == (products, 0) and shared == alone - spared


def test_a_tensor_that_was_written_to_is_read_again(sharing) -> None:
    layers = projections(dtype=torch.float32)
    sharing(True)
    x = torch.randn(6, 4, 36).requires_grad_() * 1
    with tasks(torch.tensor(EQUAL)), torch.autocast("cpu", torch.bfloat16):
        layers["query"](x)
        x.mul_(2)
        found = layers["key"](x)
        sharing(False)
        assert torch.equal(found, layers["key"](x))


def test_another_dtype_of_autocast_begins_anew(sharing) -> None:
    layers = projections(dtype=torch.float32)
    sharing(True)
    x = torch.randn(6, 4, 36).requires_grad_() * 1
    with tasks(torch.tensor(EQUAL)):
        with torch.autocast("cpu", torch.bfloat16):
            assert layers["query"](x).dtype == torch.bfloat16
        assert layers["key"](x).dtype == torch.float32


@pytest.mark.parametrize("route", ["weight", "token"])
def test_one_output_at_a_time(sharing, route: str) -> None:
    """The graph of one layer may be gone, and its weight changed, when that of another is used."""
    found: list[list[Tensor]] = []
    for on in (True, False):
        sharing(on)
        layers = projections(route)
        torch.manual_seed(1)
        leaf = torch.randn(6, 4, 36, dtype=torch.float64, requires_grad=True)
        with tasks(torch.tensor(EQUAL)):
            outputs = called(layers, leaf)
            for layer, y in zip(layers.values(), outputs, strict=True):
                y.square().sum().backward()
                with torch.no_grad():
                    layer.weight.mul_(2)
        assert leaf.grad is not None
        found.append([leaf.grad, *(p.grad for p in layers.parameters() if p.grad is not None)])
    assert_equal(*found)


@pytest.mark.parametrize("route", ["weight", "token"])
def test_second_derivatives(sharing, route: str) -> None:
    found = []
    for on in (True, False):
        sharing(on)
        layers = projections(route)
        torch.manual_seed(1)
        x = torch.randn(6, 2, 36, dtype=torch.float64, requires_grad=True)
        with tasks(torch.tensor(EQUAL)):
            total = sum(y.pow(3).sum() for y in called(layers, x))
        leaves = [x, *layers.parameters()]
        first = torch.autograd.grad(total, leaves, create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), leaves, allow_unused=True
        )
        found.append([*first, *second])
    assert_equal(*found)


@pytest.mark.parametrize("route", ["weight", "token"])
def test_backward_twice(sharing, route: str) -> None:
    sharing(True)
    layers = projections(route)
    x = torch.randn(6, 2, 36, dtype=torch.float64, requires_grad=True)
    with tasks(torch.tensor(EQUAL)):
        total = sum(y.square().sum() for y in called(layers, x))
    once, again = (
        torch.autograd.grad(total, [x, *layers.parameters()], retain_graph=True) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_symmetric_layers_share_with_others(sharing) -> None:
    found = []
    for on in (True, False):
        sharing(on)
        layers = projections("weight")
        layers["key"] = SymmetricLoRALinear(36, 3, 2, dtype=torch.float64)
        found.append(results(layers, EQUAL))
    assert_equal(*found)


def test_nothing_is_kept_after_the_block(sharing) -> None:
    sharing(True)
    layers = projections("weight")
    with contextlib.suppress(KeyError), tasks(torch.tensor(EQUAL)):
        x = torch.randn(6, 2, 36, dtype=torch.float64).requires_grad_() * 1
        y = layers["query"](x)
        left = weakref.ref(x), weakref.ref(y.grad_fn.next_functions[0][0])
        layers["none"](x)
    del x, y
    gc.collect()
    assert [reference() for reference in left] == [None, None]


def test_a_loop_in_one_block_chains_nothing(sharing) -> None:
    """A layer called again with its input begins anew, or graphs would grow from step to step."""
    sharing(True)
    layer = projections("weight")["query"]
    x = torch.randn(6, 2, 36, dtype=torch.float64, requires_grad=True)
    with tasks(torch.tensor(EQUAL)):
        nodes = []
        for _ in range(3):
            y = layer(x)
            nodes.append(weakref.ref(y.grad_fn.next_functions[0][0]))
            y.sum().backward()
        del y
        gc.collect()
        assert [node() is None for node in nodes] == [True, True, False]  # the last is kept


def test_only_what_can_be_shared_is(sharing, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bool] = []
    run = LoRALayer._run
    monkeypatch.setattr(
        LoRALayer, "_run", lambda self, *given: calls.append(given[2]) or run(self, *given)
    )
    layers = projections("weight")
    x = torch.randn(6, 2, 36, dtype=torch.float64, requires_grad=True)
    batch = TaskBatch(torch.tensor(EQUAL))

    def shared() -> bool:
        calls.clear()
        called(layers, x)
        return any(calls)

    with tasks(batch):
        sharing(False)
        assert not shared()
        sharing(True)
        assert shared()
        with torch.no_grad():
            assert not shared()
        x.requires_grad_(False)
        assert not shared()
        x.requires_grad_(True)
    with tasks(torch.tensor([0, 1, 0, 2, 1, 2])):
        assert not shared()
    calls.clear()
    layers["query"](x, batch)
    assert not any(calls)
    with tasks(batch), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.randn(6, 2, 36, dtype=torch.float64).requires_grad_() * 1
        assert not shared()


def test_a_copy_of_the_context_does_not_keep_the_input(sharing: Callable[[bool], None]) -> None:
    sharing(True)
    layers, x = projections(), torch.randn(6, 4, 36, dtype=torch.float64, requires_grad=True)
    rows = x * 1
    kept = weakref.ref(rows)
    with tasks(torch.tensor(EQUAL)):
        copied = contextvars.copy_context()
        next(iter(layers.values()))(rows)
    del rows
    gc.collect()
    assert kept() is None and copied
