"""What only the native kernels can get wrong: threads, instruction sets, registration."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from metalora._library import native_available
from metalora.linear import finetune_lora, lora_ml, sample_problem, sample_statistics
from metalora.reference import linear as reference
from tests.pairs import every_pair

pytestmark = pytest.mark.skipif(not native_available(), reason="the native library is not built")


@pytest.fixture
def _keep_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def arguments(dim: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, tuple[object, ...]]:
    problem = sample_problem(2, dim, 1, batch_shape=(3,), generator=seeded(0), dtype=dtype)
    stats = sample_statistics(problem.truths, 20, generator=seeded(1))
    test = sample_statistics(problem.test_truth, 20, generator=seeded(2))
    factors = torch.full((3, 2, dim, 2), 0.1, dtype=dtype)
    sums = (stats.gram, stats.cross, stats.energy)
    tuned = (test.gram, test.cross, test.energy, problem.base, factors[:, 0], factors[:, 1])
    return {
        "lora_ml": (*sums, problem.base, factors, 20, 4, 3, 0.03, 0.003),
        "standard": (*sums, problem.base, 20, 4, 0.03),
        "finetune_lora": (*tuned, problem.test_truth, 20, 4, 0.005),
    }


OPS = ["lora_ml", "standard", "finetune_lora"]


@pytest.mark.usefixtures("_keep_threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    problem = sample_problem(3, 10, 2, batch_shape=(7,), generator=seeded(0))
    stats = sample_statistics(problem.truths, 50, generator=seeded(1))
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        trained = lora_ml(stats, 2, outer_steps=50, generator=seeded(2))
        tuned = finetune_lora(stats, trained.weight, 2, steps=50, generator=seeded(3))
        results.append((trained.weight, trained.factors, trained.losses, *tuned.factors))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@every_pair(
    op=OPS,
    dtype=[torch.float64, torch.float32],
    dim=[1, 4, 5, 8, 9, 12, 13, 24, 25],
)
def test_every_column_length(op: str, dim: int, dtype: torch.dtype) -> None:
    inputs = list(arguments(dim, dtype)[op])
    rates = {"lora_ml": (-2, -1), "standard": (-1,), "finetune_lora": (-1,)}[op]
    for rate in rates:  # small enough for the largest d
        inputs[rate] = inputs[rate] / 30  # type: ignore[operator]
    native = getattr(torch.ops.metalora, f"linear_{op}").default(*inputs)
    expected = getattr(reference, op)(*inputs)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-3
    for actual, wanted in zip(native, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str) -> None:
    operator = getattr(torch.ops.metalora, f"linear_{op}").default
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(operator, arguments()[op], test_utils=tests)
    if op == "finetune_lora":
        without_truth = [*arguments()[op]]
        without_truth[6] = None
        torch.library.opcheck(operator, tuple(without_truth), test_utils=tests)


def test_what_divergence_leaves_is_nan() -> None:
    inputs = [*arguments()["standard"]]
    inputs[-2:] = [2000, 100.0]
    _, losses, diverged_at = torch.ops.metalora.linear_standard(*inputs)
    for row, step in zip(losses, diverged_at.tolist(), strict=True):
        assert 1 < step < 2000
        assert bool(row[: step - 1].isfinite().all())
        assert bool(row[step:].isnan().all())


@pytest.mark.parametrize("op", OPS)
def test_raw_operators_refuse_what_they_would_read_outside_of(op: str) -> None:
    operator = getattr(torch.ops.metalora, f"linear_{op}")
    good = arguments()[op]
    for position, value in enumerate(good):
        if not isinstance(value, torch.Tensor):
            continue
        for bad in (value[..., :0], value[:-1], value.to(torch.int32)):
            inputs = [*good]
            inputs[position] = bad
            with pytest.raises(RuntimeError, match=f"linear_{op}: "):
                operator(*inputs)
