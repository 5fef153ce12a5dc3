"""The kernels for every instruction set that this CPU has give the same results."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metalora import linear, ops, shallow
from metalora._library import native_available
from tests.shallow.problems import start

SWITCH = "METALORA_CPU_ISA"  # read once in a process; more than the CPU has means its best
CODE = """
import sys, torch
from tests.test_instruction_sets import results
torch.save(results(), sys.argv[1])
"""


def results() -> dict[str, Tensor]:
    """Results of trainings and of small layers, of sizes with and without rest."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for dtype in (torch.float64, torch.float32):
        for dim, rank in ((5, 2), (10, 1), (10, 3), (20, 1), (21, 4)):
            name = f"{dtype}, d = {dim}, k = {rank}"
            truths = linear.sample_problem(3, dim, rank, generator=generator, dtype=dtype).truths
            stats = linear.sample_statistics(truths, 50, generator=generator)
            rates = {"inner_lr": 0.001, "generator": generator}
            trained = linear.lora_ml(stats, rank, outer_steps=20, **rates)  # type: ignore[arg-type]
            found[f"lora_ml, {name}"] = trained.weight
            found[f"standard, {name}"] = linear.standard(stats, steps=20).losses
            few = linear.sample_statistics(truths[0], 50, generator=generator)
            tuned = linear.finetune_lora(
                few, trained.weight, rank, steps=20, lr=0.001, truth=truths[0], generator=generator
            )
            assert tuned.errors is not None
            found[f"finetune, {name}"] = tuned.errors
        for dim, samples in ((5, 50), (12, 50), (10, 700)):  # few samples have kernels of their own
            s = start(3, samples, dim, 2, dtype=dtype)
            trainings = shallow.lora_ml(s.x, s.y, s.network, s.adapters, epochs=100)
            found[f"shallow, {dtype}, d = {dim}, {samples} samples"] = trainings.losses
        for inner, outer in ((3, 8), (10, 10), (20, 20), (17, 29), (32, 31), (64, 64)):
            found |= small_layer(inner, outer, dtype, generator)
    return found | divergence()


def small_layer(
    inner: int, outer: int, dtype: torch.dtype, generator: torch.Generator
) -> dict[str, Tensor]:
    """The output and the gradients of `lora_linear`."""
    shapes = {
        "x": (150, inner),
        "weight": (outer, inner),
        "bias": (outer,),
        "lora_A": (2, 3, inner),
        "lora_B": (2, outer, 3),
    }
    inputs = {
        name: torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True)
        for name, shape in shapes.items()
    }
    y = ops.lora_linear(**inputs, task_ptr=torch.tensor([0, 17, 150]))
    gradients = torch.autograd.grad((y * y).sum(), list(inputs.values()))
    name = f"layer {inner} to {outer}, {dtype}"
    parts = dict(zip(inputs, gradients, strict=True))
    return {f"{name}, y": y.detach()} | {f"{name}, {part}": g for part, g in parts.items()}


def divergence() -> dict[str, Tensor]:
    """The step at which trainings diverge whose steps are too long."""
    found = {}
    for dtype in (torch.float64, torch.float32):
        generator = torch.Generator().manual_seed(1)
        truths = linear.sample_problem(3, 10, 1, generator=generator, dtype=dtype).truths[None]
        stats = linear.sample_statistics(truths, 50, generator=generator)
        zero = torch.zeros(1, 10, 10, dtype=dtype)
        sums = (stats.gram, stats.cross, stats.energy, zero)
        *_, steps = torch.ops.metalora.linear_standard(*sums, 50, 2000, 100.0)
        found[f"standard diverges, {dtype}"] = steps
        s = start(3, 700, 10, 2, batch=(1,), dtype=dtype)
        model = (s.x, s.y, s.network.weight, s.network.output, s.adapters.lora_A, s.adapters.lora_B)
        *_, steps = torch.ops.metalora.shallow_retrain(*model, 400, 1e4, 0.9, 0.999, 1e-8, 0.01)
        found[f"shallow diverges, {dtype}"] = steps
        assert all(
            bool((found[f"{n} diverges, {dtype}"] > 1).all()) for n in ("standard", "shallow")
        )
    return found


@pytest.mark.slow
@pytest.mark.skipif(not native_available(), reason="the native library is not built")
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_every_instruction_set_gives_the_same_results(isa: str, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.pt" for name in ("portable", isa)}
    for name, file in files.items():
        subprocess.run(
            [sys.executable, "-c", CODE, str(file)],
            env={**os.environ, SWITCH: name},
            cwd=Path(__file__).resolve().parents[1],
            check=True,
            timeout=120,
        )
    expected, actual = (torch.load(file) for file in files.values())
    assert expected.keys() == actual.keys()
    for name, wanted in expected.items():
        tolerance = 1e-11 if wanted.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            actual[name],
            wanted,
            rtol=tolerance,
            atol=tolerance * float(wanted.abs().max().clamp(min=1)),
            msg=lambda text, name=name: f"{name}: {text}",
        )
