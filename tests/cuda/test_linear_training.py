"""The linear trainers' CUDA kernels against the reference and the CPU kernels."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from metalora import linear
from metalora._library import cuda_status, native_available
from metalora.ops import _native
from metalora.reference import linear as reference
from tests.ops.problems import relative_error
from tests.pairs import every_pair

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native_available(), reason="the native library is not built"),
]

F64, F32 = torch.float64, torch.float32
Run = Callable[..., tuple[Tensor, ...]]

NAMES = ["lora_ml", "standard", "finetune_lora"]
# Trainings, T, d, k: lanes left over, tasks on several warps, more rows than lanes, and every rank
# that kernels are compiled for.
SIZES = [
    *[(1, 1, 1, 1), (3, 3, 10, 1), (2, 5, 7, 2), (1, 2, 20, 3), (2, 4, 5, 5)],
    *[(1, 1, 33, 1), (1, 2, 12, 9), (2, 5, 20, 1)],
]


@pytest.fixture(params=["shim", pytest.param("cuda", marks=pytest.mark.gpu)])
def run(request: pytest.FixtureRequest) -> Run:
    """Calls a raw operator on a GPU, or its code on the CPU; takes and returns CPU tensors."""
    if request.param == "shim":
        operators = request.getfixturevalue("shim_operators")
        return lambda name, *inputs: getattr(operators, f"linear_{name}")(*inputs)
    assert native_available("cuda"), cuda_status

    def on_gpu(name: str, *inputs: Any) -> tuple[Tensor, ...]:
        moved = [t.cuda() if isinstance(t, Tensor) else t for t in inputs]
        return tuple(t.cpu() for t in getattr(torch.ops.metalora, f"linear_{name}")(*moved))

    return on_gpu


def cpu(name: str, *inputs: Any) -> tuple[Tensor, ...]:
    results: tuple[Tensor, ...] = getattr(torch.ops.metalora, f"linear_{name}")(*inputs)
    return results


def arguments(
    name: str, size: tuple[int, int, int, int], dtype: torch.dtype = F64, steps: int = 6
) -> list[Any]:
    trainings, tasks, dim, rank = size
    generator = torch.Generator().manual_seed(dim)
    problem = linear.sample_problem(
        tasks, dim, rank, batch_shape=(trainings,), generator=generator, dtype=dtype
    )
    stats = linear.sample_statistics(problem.truths, 50, generator=generator)
    test = linear.sample_statistics(problem.test_truth, 30, generator=generator)
    shape = (2, trainings, tasks, dim, rank)
    start_u, start_v = (0.3 * torch.randn(shape, generator=generator, dtype=F64)).to(dtype)
    sums, weight = (stats.gram, stats.cross, stats.energy), problem.base * 0.9
    if name == "lora_ml":
        return [*sums, weight, start_u, 50, steps, 4, 0.03, 0.0005]
    if name == "standard":
        return [*sums, weight, 50, steps, 0.03]
    tuned = (test.gram, test.cross, test.energy, weight, start_u[:, 0], start_v[:, 0])
    return [*tuned, problem.test_truth, 30, steps, 0.002]


def doubled(inputs: Sequence[Any]) -> list[Any]:
    return [t.double() if isinstance(t, Tensor) else t for t in inputs]


@every_pair(
    dtype=[F64, F32],
    size=SIZES,
    name=NAMES,
)
def test_results_are_those_of_the_reference(
    run: Run, name: str, size: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    inputs = arguments(name, size, dtype)
    copies = [t.clone() if isinstance(t, Tensor) else t for t in inputs]
    results = run(name, *inputs)
    expected = getattr(reference, name)(*doubled(inputs))
    for result, wanted in zip(results[:-1], expected[:-1], strict=True):
        assert result.dtype == dtype
        assert result.shape == wanted.shape
        assert relative_error(result, wanted) < (1e-13 if dtype == F64 else 2e-5)
    assert torch.equal(results[-1], torch.zeros(size[0], dtype=torch.int64))
    for value, copy in zip(inputs, copies, strict=True):
        assert not isinstance(value, Tensor) or torch.equal(value, copy)


@pytest.mark.parametrize("name", NAMES)
def test_results_are_the_same_bits_in_any_order_and_company(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = arguments(name, (3, 5, 7, 2))
    results = run(name, *inputs)
    monkeypatch.setitem(os.environ, "METALORA_SHIM_ORDER", "reverse")
    for first, again in zip(results, run(name, *inputs), strict=True):
        assert torch.equal(first, again)
    alone = run(name, *(t[1:2] if isinstance(t, Tensor) else t for t in inputs))
    for one, several in zip(alone, results, strict=True):
        assert torch.equal(one, several[1:2])


def test_trainings_of_the_papers_length_are_those_of_the_cpu(run: Run) -> None:
    inputs = arguments("lora_ml", (2, 3, 10, 1))
    inputs[3] = torch.zeros_like(inputs[3])
    inputs[-4:] = [3000, 10, 0.03, 0.003]
    trained, expected = run("lora_ml", *inputs), cpu("lora_ml", *inputs)
    for result, wanted in zip(trained, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)
    inputs = arguments("finetune_lora", (2, 1, 10, 1), steps=3000)
    inputs[-1] = 0.005
    tuned, expected = run("finetune_lora", *inputs), cpu("finetune_lora", *inputs)
    assert bool((expected[3][:, -1] < 0.05 * expected[3][:, 0]).all())
    for result, wanted in zip(tuned, expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_divergence_is_found_at_the_step_of_the_cpu(
    run: Run, name: str, dtype: torch.dtype
) -> None:
    inputs = arguments(name, (3, 3, 6, 2), dtype, steps=400)
    inputs[-1] *= 300
    if name == "standard":
        inputs[-1] = 8.0
    inputs[0][1] *= 1e-3  # this one does not diverge, or later
    results, expected = run(name, *inputs), cpu(name, *inputs)
    assert bool((expected[-1][[0, 2]] > 0).all())
    assert torch.equal(results[-1], expected[-1])
    for record in results[2:-1] if name != "standard" else results[1:-1]:
        for row, step in zip(record, results[-1].tolist(), strict=True):
            if step:
                assert bool(row[: step - 1].isfinite().all())
                assert bool(row[step:].isnan().all())


@pytest.mark.parametrize("name", NAMES)
def test_no_steps_and_no_trainings(run: Run, name: str) -> None:
    inputs = arguments(name, (2, 2, 5, 2), steps=0)
    for result, wanted in zip(run(name, *inputs), cpu(name, *inputs), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-13, atol=1e-13)
    inputs = [t[:0] if isinstance(t, Tensor) else t for t in inputs]
    assert all(result.shape[0] == 0 for result in run(name, *inputs))
    lora_ml = arguments("lora_ml", (2, 2, 5, 2))
    lora_ml[-3] = 0  # inner steps
    assert torch.equal(run("lora_ml", *lora_ml)[1], lora_ml[4])


def test_fine_tuning_without_truth_records_no_errors(run: Run) -> None:
    inputs = arguments("finetune_lora", (2, 1, 5, 2))
    with_truth = run("finetune_lora", *inputs)
    inputs[6] = None
    u, v, losses, errors, diverged_at = run("finetune_lora", *inputs)
    assert errors.shape == (2, 0)
    kept = (with_truth[0], with_truth[1], with_truth[2], with_truth[4])
    assert all(torch.equal(a, b) for a, b in zip((u, v, losses, diverged_at), kept, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_strided_inputs(run: Run, name: str) -> None:
    inputs = arguments(name, (2, 3, 5, 2))
    strided = [
        t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if isinstance(t, Tensor) and t.dim() > 2
        else t
        for t in inputs
    ]
    for a, b in zip(run(name, *inputs), run(name, *strided), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_operators_refuse_what_they_would_read_outside_of(run: Run, name: str) -> None:
    good = arguments(name, (2, 2, 5, 2))
    for position, value in enumerate(good):
        if isinstance(value, Tensor):
            for bad in (value[..., :0], value[:-1], value.to(torch.int32)):
                inputs = [*good]
                inputs[position] = bad
                with pytest.raises(RuntimeError, match=f"linear_{name}: "):
                    run(name, *inputs)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("lora_ml", (1, 9, 60, 1)),  # shared memory
        ("lora_ml", (1, 600, 1, 1)),  # threads
        ("standard", (1, 1, 130, 1)),
        ("finetune_lora", (1, 1, 130, 1)),
    ],
)
def test_what_does_not_fit_is_one_line(
    run: Run, name: str, size: tuple[int, int, int, int]
) -> None:
    with pytest.raises(RuntimeError) as caught:
        run(name, *arguments(name, size))
    message = str(caught.value)
    assert message.startswith(f"linear_{name}: a training must fit into a block of this GPU")
    assert f"d={size[2]}" in message and "move the tensors to the CPU" in message
    assert "\n" not in message


def test_the_public_functions_take_this_code(
    shim_operators: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any leading dimensions, as everywhere."""
    problem = linear.sample_problem(3, 6, 2, batch_shape=(2, 2))
    stats = linear.sample_statistics(problem.truths, 30)
    start = 0.1 * torch.randn(2, 2, 3, 6, 2, dtype=F64)
    settings = {"outer_steps": 20, "inner_lr": 0.001, "initial_factors": start}
    expected = linear.lora_ml(stats, 2, **settings)  # type: ignore[arg-type]
    called = []

    def counted(*inputs: Any) -> Any:
        called.append(inputs)
        return shim_operators.linear_lora_ml(*inputs)

    monkeypatch.setitem(_native._raw, "linear_lora_ml", counted)
    result = linear.lora_ml(stats, 2, **settings)  # type: ignore[arg-type]
    assert len(called) == 1
    for name in ("weight", "factors", "losses"):
        torch.testing.assert_close(
            getattr(result, name), getattr(expected, name), rtol=1e-12, atol=1e-12
        )


@pytest.mark.gpu
def test_the_public_functions_run_on_a_gpu() -> None:
    generator = torch.Generator().manual_seed(0)
    problem = linear.sample_problem(3, 10, 1, batch_shape=(4,), generator=generator)
    stats = linear.sample_statistics(problem.truths, 500, generator=generator)
    start = 0.1 * torch.randn(4, 3, 10, 1, generator=generator, dtype=F64)
    expected = linear.lora_ml(stats, 1, initial_factors=start)
    result = linear.lora_ml(stats.to("cuda"), 1, initial_factors=start.cuda())
    assert result.weight.is_cuda
    torch.testing.assert_close(result.weight.cpu(), expected.weight, rtol=1e-10, atol=1e-10)
