"""The shallow network's trainers by the CUDA operators, on a GPU and through the shim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from metalora._library import native_available
from metalora.ops import _native
from metalora.reference import shallow as reference
from metalora.shallow import Adapters, Network, lora_ml
from tests.cuda.places import Calls
from tests.pairs import every_pair
from tests.shallow.problems import start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_available(), reason="the native library is not built"),
]

ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01)
OTHER = (0.05, 0.8, 0.95, 1e-3, 0.3)
OPS = ("retrain", "retrain without adapters", "finetune_lora")
# T, N, d, k: fewer samples than a warp, a last pair half filled, a hidden unit more than a tile
# and one less, more tiles than warps, full rank
SIZES = [(1, 1, 1, 1), (3, 40, 10, 1), (2, 65, 3, 2), (2, 131, 5, 3), (2, 33, 6, 1)]
SIZES += [(1, 70, 20, 2), (3, 9, 4, 4), (1, 200, 14, 1)]


def arguments(
    op: str, *sizes: int, epochs: int = 30, adamw: tuple[float, ...] = ADAMW, **settings: Any
) -> list[Any]:
    """Of a raw operator, on the CPU: three trainings of ``sizes`` T, N, d, k."""
    s = start(*sizes, **{"batch": (3,), **settings})
    s = s.one_task() if op == "finetune_lora" else s
    adapters = (s.adapters.lora_A, s.adapters.lora_B)
    if op == "retrain without adapters":
        adapters = (None, None)  # type: ignore[assignment]
    return [s.x, s.y, s.network.weight, s.network.output, *adapters, epochs, *adamw]


def on_cpu(op: str, inputs: list[Any]) -> tuple[Tensor, ...]:
    return getattr(torch.ops.metalora, f"shallow_{op.split()[0]}")(*inputs)


def by_cuda(op: str, inputs: list[Any], device: torch.device) -> list[Tensor]:
    moved = [a.to(device) if isinstance(a, Tensor) else a for a in inputs]
    results = _native.raw(f"shallow_{op.split()[0]}")(*moved)
    assert all(result.device.type == device.type for result in results)
    return [result.cpu() for result in results]


@every_pair(
    adamw=[ADAMW, OTHER],
    op=OPS,
    sizes=SIZES,
)
def test_agrees_with_the_cpu(
    device: torch.device, sizes: tuple[int, ...], op: str, adamw: tuple[float, ...]
) -> None:
    inputs = arguments(op, *sizes, adamw=adamw)
    for got, wanted in zip(by_cuda(op, inputs, device), on_cpu(op, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_samples_that_do_not_fit_into_shared_memory(device: torch.device, op: str) -> None:
    """512 KiB of them, in chunks of which the last is short."""
    sizes = (1, 13_000, 5, 1) if op == "finetune_lora" else (2, 6_500, 5, 1)
    inputs = arguments(op, *sizes, epochs=2, batch=(1,))
    for got, wanted in zip(by_cuda(op, inputs, device), on_cpu(op, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_large_hidden_layers_take_smaller_blocks(device: torch.device, op: str) -> None:
    inputs = arguments(op, 1, 1000, 48, 1, epochs=2, batch=(1,), dtype=torch.float32)
    wanted = on_cpu(op, [a.double() if isinstance(a, Tensor) else a for a in inputs])
    for got, exact in zip(by_cuda(op, inputs, device), wanted, strict=True):
        torch.testing.assert_close(got.double(), exact.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", OPS)
def test_float32_is_as_near_to_float64_as_pytorch(device: torch.device, op: str) -> None:
    name = op.split()[0]
    exact = on_cpu(op, arguments(op, 3, 150, 10, 2))[-2]
    single = arguments(op, 3, 150, 10, 2, dtype=torch.float32)
    plain = getattr(reference, name)(*single)[-2]
    ours = by_cuda(op, single, device)[-2]

    def error(losses: Tensor) -> float:
        return float((losses.double() / exact - 1).abs().max())

    assert ours.dtype == torch.float32
    assert error(ours) <= 2 * error(plain) + 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("scale", [30.0, 1e4, 1e30])
def test_saturated_hidden_units(device: torch.device, scale: float, op: str) -> None:
    inputs = arguments(op, 2, 50, 5, 1)
    inputs[2] = scale * inputs[2]
    for got, wanted in zip(by_cuda(op, inputs, device), on_cpu(op, inputs), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("op", OPS)
def test_divergence(device: torch.device, op: str) -> None:
    inputs = arguments(op, 2, 9, 4, 2, epochs=400, adamw=(1e4, *ADAMW[1:]))
    *_, losses, diverged_at = by_cuda(op, inputs, device)
    *_, cpu_losses, cpu_diverged_at = on_cpu(op, inputs)
    assert bool((diverged_at > 1).all())
    assert torch.equal(diverged_at, cpu_diverged_at)
    assert torch.equal(losses.isfinite(), cpu_losses.isfinite())
    assert torch.equal(losses.isnan(), cpu_losses.isnan())


@pytest.mark.parametrize("op", OPS)
def test_last_step_that_diverges(device: torch.device, op: str) -> None:
    """The losses are finite, the results are not."""
    inputs = arguments(op, 2, 9, 4, 2, epochs=1, dtype=torch.float32)
    inputs[-1] = 1e300  # weight decay
    *_, losses, diverged_at = by_cuda(op, inputs, device)
    assert bool(losses.isfinite().all())
    assert diverged_at.tolist() == [1, 1, 1]


@pytest.mark.parametrize("op", OPS)
def test_no_epochs_and_no_trainings(device: torch.device, op: str) -> None:
    inputs = arguments(op, 2, 9, 4, 2, epochs=0)
    for got, wanted in zip(by_cuda(op, inputs, device), on_cpu(op, inputs), strict=True):
        assert torch.equal(got, wanted)
    none = [a[:0] if isinstance(a, Tensor) else a for a in inputs]
    for got, wanted in zip(by_cuda(op, none, device), on_cpu(op, none), strict=True):
        assert got.shape == wanted.shape


@pytest.mark.parametrize("op", OPS)
def test_a_training_alone_and_again_gives_the_same_bits(device: torch.device, op: str) -> None:
    inputs = arguments(op, 3, 100, 10, 2, dtype=torch.float32)
    results = by_cuda(op, inputs, device)
    assert all(map(torch.equal, by_cuda(op, inputs, device), results))
    one = [a[1:2] if isinstance(a, Tensor) else a for a in inputs]
    assert all(map(torch.equal, by_cuda(op, one, device), [r[1:2] for r in results]))


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone_and_layout_does_not_matter(device: torch.device, op: str) -> None:
    inputs = [a.to(device) if isinstance(a, Tensor) else a for a in arguments(op, 2, 11, 5, 2)]
    before = [a.clone() if isinstance(a, Tensor) else a for a in inputs]
    results = by_cuda(op, inputs, device)
    assert all(
        torch.equal(a, b) for a, b in zip(inputs, before, strict=True) if isinstance(a, Tensor)
    )
    strided = [a.mT.contiguous().mT if isinstance(a, Tensor) else a for a in inputs]
    assert all(map(torch.equal, by_cuda(op, strided, device), results))


@pytest.mark.parametrize("op", OPS)
def test_refuses_what_it_would_read_outside_of(device: torch.device, op: str) -> None:
    good = arguments(op, 2, 9, 4, 2)
    for position, value in enumerate(good):
        if not isinstance(value, Tensor):
            continue
        for bad in (value[..., :0], value[:-1], value[0], value.to(torch.int32)):
            inputs = [*good]
            inputs[position] = bad
            with pytest.raises(RuntimeError, match=f"shallow_{op.split()[0]}: "):
                by_cuda(op, inputs, device)


@pytest.mark.parametrize("op", OPS)
def test_parameters_that_do_not_fit(device: torch.device, op: str) -> None:
    message = r": all but a training's samples must fit .* of \d+ bytes, but T=1, d=100, rank=\d "
    with pytest.raises(RuntimeError, match=f"shallow_{op.split()[0]}{message}"):
        by_cuda(op, arguments(op, 1, 2, 100, 1), device)


def test_public_function_takes_the_cuda_operator(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    s = start(2, 20, 4, 1)
    network = Network(s.network.weight.to(device), s.network.output.to(device))
    adapters = Adapters(s.adapters.lora_A.to(device), s.adapters.lora_B.to(device))
    result = lora_ml(s.x.to(device), s.y.to(device), network, adapters, epochs=3)
    assert calls.names == ["shallow_retrain"]
    assert result.losses.device.type == device.type
