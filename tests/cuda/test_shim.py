"""The shim keeps CUDA's promises and no others, and the sanitizers find what is planted."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.shim import build

pytestmark = pytest.mark.slow

# Case -> who finds the flaw, and what it says. None: the shim itself, in every build.
PLANTED = {
    "barrier": ("thread", "data race"),
    "barrier_static": ("thread", "data race"),
    "warp_barrier": ("thread", "data race"),
    "reuse": ("thread", "data race"),
    "blocks": ("thread", "data race"),
    "copy_barrier": ("thread", "data race"),
    "shared_overrun": ("address", "heap-buffer-overflow"),
    "static_overrun": ("address", "global-buffer-overflow"),
    "global_overrun": ("address", "heap-buffer-overflow"),
    "local_overrun": ("address", "stack-buffer-overflow"),
    "misaligned": ("address", "misaligned"),
    "misaligned_copy": ("none", "copy_async_16: both addresses must be multiples of 16"),
    "deadlock": ("none", "threads wait for ever: 16 at planted.cu:"),
    "two_barriers": ("none", "threads meet in different places: planted.cu:"),
}


@pytest.fixture(scope="session")
def planted(cache: Path) -> dict[str, Path]:
    sources = [build.SHIM / "planted.cu"]
    return {name: build.program(cache, sources, name) for name in build.SANITIZERS}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_flaw_is_found(planted: dict[str, Path], case: str) -> None:
    sanitizer, message = PLANTED[case]
    wrong = build.run(planted[sanitizer], case, "wrong")
    assert wrong.returncode != 0
    assert message in wrong.stderr
    for program in planted.values():
        right = build.run(program, case, "right")
        assert right.returncode == 0, right.stderr[-3000:]


@pytest.fixture(scope="session")
def probes(cache: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(build.shared_library(cache, [build.SHIM / "probes.cu"])))


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("amount", [1, 5, 16])
def test_shuffles(probes: ctypes.CDLL, dtype: torch.dtype, width: int, amount: int) -> None:
    x = torch.randn(32, dtype=dtype)
    got = torch.empty(4, 32, dtype=dtype)
    name = "run_shuffles_float" if dtype == torch.float32 else "run_shuffles_double"
    getattr(probes, name)(pointer(got), pointer(x), amount, width)
    lanes = range(32)
    first = [lane - lane % width for lane in lanes]
    sources = [
        [first[lane] + amount % width for lane in lanes],
        [lane - amount for lane in lanes],
        [lane + amount for lane in lanes],
        [lane ^ amount for lane in lanes],
    ]
    for row, source in zip(got, sources, strict=True):
        inside = [s if first[i] <= s < first[i] + width else i for i, s in enumerate(source)]
        assert torch.equal(row, x[inside])


def test_shuffles_from_ended_lanes_are_undefined(probes: ctypes.CDLL) -> None:
    got = torch.zeros(2, 16)
    probes.run_shuffles_without_upper_half(pointer(got))
    assert got[0].isnan().all()
    assert got[1].tolist() == [lane ^ 1 for lane in range(16)]


def test_mma_is_a_product_of_rounded_factors(probes: ctypes.CDLL) -> None:
    a, b, c = torch.randn(16, 8), torch.randn(8, 8), torch.empty(16, 8)
    probes.run_product(pointer(c), pointer(a), pointer(b))
    wanted = rounded_to_tf32(a).double() @ rounded_to_tf32(b).double()
    torch.testing.assert_close(c, wanted.float(), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(c.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-6)


def rounded_to_tf32(x: Tensor) -> Tensor:
    """To a multiple of the last of 10 bits after the point, ties away from zero."""
    mantissa, exponent = torch.frexp(x.double())
    scaled = mantissa * 2**11
    return torch.ldexp(torch.trunc(scaled + 0.5 * scaled.sign()), exponent - 11).float()


def test_tf32_rounding(probes: ctypes.CDLL) -> None:
    tie = torch.tensor([1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-23, 3.0, 0.0, -0.0])
    infinite = torch.tensor([float("inf"), -float("inf"), float("nan"), 3.4e38])
    x = torch.cat([tie, torch.randn(1000), infinite])
    got = torch.empty_like(x)
    probes.round_to_tf32(pointer(got), pointer(x), ctypes.c_int64(len(x)))
    assert torch.equal(got[:-4], rounded_to_tf32(x[:-4]))
    assert got[:2].tolist() == [1 + 2**-10, -1 - 2**-10]
    assert got[-4:-2].tolist() == [float("inf"), -float("inf")]
    assert got[-2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("low", [0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_conversions_are_those_of_torch(probes: ctypes.CDLL, dtype: torch.dtype, low: int) -> None:
    """Of all patterns of 16 bits to float, and of floats with all patterns of their upper 16."""
    patterns = torch.arange(2**16, dtype=torch.int64)
    x = (patterns << 16 | low).to(torch.uint32).view(torch.float32)
    shortened, widened = torch.empty(2**16, dtype=dtype), torch.empty(2**16)
    function = probes.convert_bf16 if dtype == torch.bfloat16 else probes.convert_f16
    function(pointer(shortened), pointer(x), pointer(widened), ctypes.c_int64(2**16))
    wanted = patterns.to(torch.uint16).view(dtype).float()
    for got, right in ((shortened, x.to(dtype)), (widened, wanted)):
        assert torch.equal(got.isnan(), right.isnan())
        bits = torch.int32 if got.dtype == torch.float32 else torch.int16
        number = ~right.isnan()
        assert torch.equal(got.view(bits)[number], right.view(bits)[number])


@pytest.mark.parametrize("threads", [1, 32, 256, 1024])
def test_barriers_do_not_wait_for_ended_threads(probes: ctypes.CDLL, threads: int) -> None:
    x = torch.randint(0, 10, (3, threads)).float()
    sums = torch.empty(3)
    probes.run_block_sums(pointer(sums), pointer(x), 3, threads)
    assert torch.equal(sums, x.sum(1))


def test_positions(probes: ctypes.CDLL) -> None:
    got = torch.full((4, 6, 6, 3), -1, dtype=torch.int32)
    probes.run_positions(pointer(got))
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(6), torch.arange(6), indexing="ij")
    assert torch.equal(got, torch.stack([x, y, z], dim=-1).int())


def test_shared_memory_starts_undefined_in_every_block(probes: ctypes.CDLL) -> None:
    got = torch.zeros(2, 2)
    probes.run_fresh_shared(pointer(got))
    assert got.isnan().all()


def test_copies_arrive_when_waited_for(probes: ctypes.CDLL) -> None:
    memory = torch.arange(12.0)  # of which 8 begin at a multiple of 16 bytes
    x = memory[-memory.data_ptr() // 4 % 4 :][:8]
    got = torch.zeros(3, 2)
    probes.run_copies(pointer(got), pointer(x))
    assert got[0].isnan().all()
    assert got[1, 0] == x[0] and got[1, 1].isnan()
    assert got[2].tolist() == [x[0], x[4]]


@pytest.mark.parametrize(("order", "first"), [("", 0), ("reverse", 14)])
def test_order_can_be_reversed(
    probes: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, order: str, first: int
) -> None:
    monkeypatch.setenv("METALORA_SHIM_ORDER", order)
    got = torch.zeros(2, dtype=torch.int32)
    probes.run_order(pointer(got[:1]), pointer(got[1:]))
    assert got.tolist() == [first, 15]


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 32, 0), ""),
        ((1, 1025, 0), "nothing: threads per block must be at most 1024, got 1025"),
        ((1, 32, 200_000), "nothing: shared memory must be at most 101376, got 200000"),
        ((0, 32, 0), "nothing: empty launch"),
    ],
)
def test_launches_that_a_gpu_refuses(
    probes: ctypes.CDLL, size: tuple[int, int, int], message: str
) -> None:
    text = ctypes.create_string_buffer(200)
    probes.launch_of_size(size[0], size[1], ctypes.c_int64(size[2]), text)
    assert text.value.decode() == message
