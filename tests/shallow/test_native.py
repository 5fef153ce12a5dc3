"""What only the native kernels can get wrong: threads, instruction sets, registration."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metalora._library import native_available
from metalora.reference import shallow as reference
from metalora.shallow import finetune_lora, lora_ml
from tests.pairs import every_pair
from tests.shallow.problems import start

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library is not built")
ADAMW = (1e-3, 0.9, 0.999, 1e-8, 0.01)
OPS = ["retrain", "retrain without adapters", "finetune_lora"]


def arguments(op: str, *sizes: int, dtype: torch.dtype = torch.float64) -> list[Any]:
    """Of a raw operator: three trainings of ``sizes`` T, N, d, k."""
    s = start(*sizes, batch=(3,), dtype=dtype)
    s = s.one_task() if op == "finetune_lora" else s
    adapters = (s.adapters.lora_A, s.adapters.lora_B)
    if op == "retrain without adapters":
        adapters = (None, None)  # type: ignore[assignment]
    return [s.x, s.y, s.network.weight, s.network.output, *adapters, 6, *ADAMW]


def operator(op: str) -> Any:
    return getattr(torch.ops.metalora, f"shallow_{op.split()[0]}").default


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    s = start(2, 70, 10, 2, batch=(7,), dtype=torch.float32)
    one = s.one_task()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        trained = lora_ml(s.x, s.y, s.network, s.adapters, epochs=50)
        tuned = finetune_lora(one.x, one.y, trained.network, one.adapters, epochs=50)
        assert trained.adapters is not None
        results.append(
            (
                *(trained.network.weight, trained.network.output, trained.losses),
                *(trained.adapters.lora_A, trained.adapters.lora_B),
                *(tuned.adapters.lora_A, tuned.adapters.lora_B, tuned.losses),
            )
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


# Every remainder of the groups of hidden units, of the vectors of samples, and of the blocks.
SIZES = [(1, 1, 1, 1), (2, 8, 2, 1), (1, 9, 3, 3), (2, 16, 4, 2), (1, 17, 5, 1), (1, 31, 6, 1)]
SIZES += [(2, 64, 8, 3), (1, 257, 11, 1), (1, 300, 14, 2), (2, 520, 10, 1), (1, 70, 33, 4)]


@every_pair(
    op=OPS,
    dtype=[torch.float64, torch.float32],
    sizes=SIZES,
)
def test_every_size(op: str, dtype: torch.dtype, sizes: tuple[int, ...]) -> None:
    inputs = arguments(op, *sizes, dtype=dtype)
    expected = getattr(reference, op.split()[0])(*inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-4
    for actual, wanted in zip(operator(op)(*inputs), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator(op), tuple(arguments(op, 2, 9, 4, 2)), test_utils=tests)


@pytest.mark.parametrize("op", OPS)
def test_what_divergence_leaves_is_nan(op: str) -> None:
    inputs = arguments(op, 2, 9, 4, 2)
    inputs[6:8] = [400, 1e4]
    *_, losses, diverged_at = operator(op)(*inputs)
    for row, epoch in zip(losses, diverged_at.tolist(), strict=True):
        assert 1 < epoch < 400
        assert bool(row[: epoch - 1].isfinite().all())
        assert not bool(row[epoch - 1].isfinite())
        assert bool(row[epoch:].isnan().all())
    expected = getattr(reference, op.split()[0])(*inputs)[-1]
    assert diverged_at.tolist() == expected.tolist()


@pytest.mark.parametrize("op", OPS)
def test_raw_operators_refuse_what_they_would_read_outside_of(op: str) -> None:
    good = arguments(op, 2, 9, 4, 2)
    for position, value in enumerate(good):
        if not isinstance(value, torch.Tensor):
            continue
        for bad in (value[..., :0], value[:-1], value[0], value.to(torch.int32)):
            inputs = [*good]
            inputs[position] = bad
            with pytest.raises(RuntimeError, match=f"shallow_{op.split()[0]}: "):
                operator(op)(*inputs)
    if op == "retrain":
        with pytest.raises(RuntimeError, match="given together, or neither"):
            operator(op)(*good[:5], None, *good[6:])
