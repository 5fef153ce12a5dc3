"""What raw operators say to tensors that no kernel can take: one line, and nothing is computed."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metalora import ops
from metalora._library import native_available
from metalora.ops import _native
from tests.ops.raw_calls import ARGUMENTS, defined_operators, has_kernel, tensor_arguments

pytestmark = pytest.mark.usefixtures("native")

EACH = [
    (name, position, argument)
    for name in (ARGUMENTS if native_available() else ())
    for position, argument in tensor_arguments(name)
]
each_tensor = pytest.mark.parametrize(("name", "position", "argument"), EACH)


def spoiled(name: str, position: int, change: Any) -> tuple[Any, ...]:
    given = list(ARGUMENTS[name]())
    given[position] = change(given[position])
    return tuple(given)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def cut(tensor: Tensor) -> Tensor:
    """The same numbers as every second one of a tensor, whose last is no more in memory."""
    wide = torch.stack([tensor, tensor], -1)[..., 0]
    wide.untyped_storage().resize_(wide.untyped_storage().nbytes() - 2 * tensor.itemsize)
    return wide


def test_a_library_of_other_sources_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_native, "operators", [])
    message = r"no operator 'newer', since it was built from other sources; build it again: METALO"
    with pytest.raises(ImportError, match=message):
        _native.register("newer")(lambda a: a.x)


def test_every_operator_has_a_kernel_a_fake_kernel_and_a_call_here() -> None:
    defined = defined_operators("metalora")
    assert set(ARGUMENTS) == defined == set(_native._raw)
    assert len(_native.operators) == len(defined)
    assert [name for name in defined if not has_kernel("metalora", name)] == []


@pytest.mark.parametrize("name", ARGUMENTS)
def test_the_calls_are_right_as_they_are(name: str) -> None:
    _native.raw(name)(*ARGUMENTS[name]())


@pytest.mark.parametrize("change", [freed, cut])
@each_tensor
def test_memory_that_is_gone_is_named(name: str, position: int, argument: str, change: Any) -> None:
    with pytest.raises(RuntimeError, match=rf"^\w+: {argument} \[.*\] must be in memory") as caught:
        _native.raw(name)(*spoiled(name, position, change))
    assert "\n" not in str(caught.value).strip()


@each_tensor
def test_a_meta_tensor_among_real_ones_is_named(name: str, position: int, argument: str) -> None:
    if name == "dropout_mask":
        pytest.skip("its only tensor: a meta mask of a meta seed is right")
    with pytest.raises(RuntimeError, match=rf"^torch\.ops\.metalora\.{name}: .* must be on the"):
        _native.raw(name)(*spoiled(name, position, lambda t: t.to("meta")))


@pytest.mark.parametrize("name", ARGUMENTS)
def test_meta_tensors_alone_give_meta_results(name: str) -> None:
    """Row pointers may stay on the CPU, as for tensors on a GPU."""
    given = ARGUMENTS[name]()
    names = dict(tensor_arguments(name))
    moved = [
        a.to("meta") if i in names and names[i] != "task_ptr" else a for i, a in enumerate(given)
    ]
    real, fake = _native.raw(name)(*given), _native.raw(name)(*moved)
    for wanted, got in zip(tree_leaves(real), tree_leaves(fake), strict=True):
        assert got.is_meta
        assert (got.shape, got.dtype) == (wanted.shape, wanted.dtype)


@each_tensor
def test_views_of_every_kind_are_read_right(name: str, position: int, argument: str) -> None:
    given = ARGUMENTS[name]()
    tensor = given[position]
    negative = torch._neg_view(-tensor) if tensor.is_floating_point() else tensor.clone()
    offset = torch.cat([tensor.flatten(), tensor.flatten()])[tensor.numel() :].view(tensor.shape)
    apart = torch.stack([tensor, -tensor], -1)[..., 0]
    for view in (negative, offset, apart):
        changed = [*given[:position], view, *given[position + 1 :]]
        for wanted, got in zip(
            *(tree_leaves(_native.raw(name)(*a)) for a in (given, changed)),
            strict=True,
        ):
            torch.testing.assert_close(got, wanted, equal_nan=True)


def test_sparse_tensors_are_refused() -> None:
    weight, lora_A, lora_B = torch.randn(4, 5), torch.randn(2, 3, 5), torch.randn(2, 4, 3)
    text = "lora_linear: x must be a dense tensor, got layout torch.sparse_coo; convert it with"
    with pytest.raises(TypeError, match=re.escape(text)):
        ops.lora_linear(
            torch.ones(7, 5).to_sparse(), weight, None, lora_A, lora_B, torch.tensor([0, 3, 7])
        )
    with pytest.raises(TypeError, match=r"^merge_lora: weight must be a dense tensor"):
        ops.merge_lora(weight.to_sparse(), lora_A, lora_B)


def test_a_shortage_of_memory_is_told_as_torch_tells_it() -> None:
    """Of 64 TiB; from no rank, so that the factors need no memory."""
    tasks = 2**44
    given = torch.zeros(1, 1), torch.zeros(tasks, 0, 1), torch.zeros(tasks, 1, 0)
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        _native.call("merge_lora", *given, 1.0, None, False)


def test_a_shortage_of_gpu_memory_has_the_type_that_torch_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(*arguments: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(_native, "raw", lambda name: raises)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 2.00 GiB\.$"):
        _native.call("merge_lora")
