"""How many trainings of the two small models a device does in a second.

python -m benchmarks.trainers [--device cuda] [--write DIR]

Trainings are those of the paper's settings, d = 10 and T = 3: the linear model's 3000 x 10 steps in
float64, and 1000 epochs of the shallow network in float32 at N = 1000. The losses of a few steps
are compared with the reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from benchmarks.lib.cli import DeviceSettings, parse
from benchmarks.lib.measure import side_by_side
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard
from metalora import linear, shallow

TASKS, DIM, RANK = 3, 10, 1
COUNTS = {"cpu": {"linear": 16, "shallow": 4}, "cuda": {"linear": 8192, "shallow": 528}}
STEPS = {"linear": 3000, "shallow": 1000}
GATE_STEPS, TOLERANCE = 20, {"linear": 1e-10, "shallow": 1e-4}


@dataclass(frozen=True)
class Trainings:
    """``run(steps)`` returns the losses [trainings, steps]."""

    count: int
    run: Callable[[int], Tensor]


def linear_trainings(count: int, device: str) -> Trainings:
    generator = torch.Generator().manual_seed(0)
    problem = linear.sample_problem(TASKS, DIM, RANK, batch_shape=(count,), generator=generator)
    stats = linear.sample_statistics(problem.truths, 5000, generator=generator).to(device)
    start = 0.1 * torch.randn(count, TASKS, DIM, RANK, generator=generator, dtype=torch.float64)
    start = start.to(device)

    def run(steps: int) -> Tensor:
        return linear.lora_ml(stats, RANK, outer_steps=steps, initial_factors=start).losses

    return Trainings(count, run)


def shallow_trainings(count: int, device: str) -> Trainings:
    generator = torch.Generator().manual_seed(0)
    problem = shallow.sample_problem(TASKS, DIM, RANK, batch_shape=(count,), generator=generator)
    x, y = (t.to(device) for t in shallow.sample_data(problem.networks, 1000, generator=generator))
    network = shallow.initial_network(DIM, batch_shape=(count,), generator=generator)
    adapters = shallow.initial_adapters(RANK, DIM, batch_shape=(count, TASKS), generator=generator)
    network = shallow.Network(*(t.to(device) for t in (network.weight, network.output)))
    adapters = shallow.Adapters(*(t.to(device) for t in (adapters.lora_A, adapters.lora_B)))

    def run(steps: int) -> Tensor:
        return shallow.lora_ml(x, y, network, adapters, epochs=steps).losses

    return Trainings(count, run)


MODELS = {"linear": linear_trainings, "shallow": shallow_trainings}


def check(name: str, device: str) -> float:
    """The largest relative difference of the losses from the reference's.

    Raises:
        AssertionError: if it is above the tolerance.
    """
    trainings = MODELS[name](2, device)
    found = trainings.run(GATE_STEPS).cpu()
    with mock.patch("metalora.ops._trainings.usable", return_value=False):
        wanted = trainings.run(GATE_STEPS).cpu()
    error = float(((found - wanted) / wanted).abs().max())
    assert error <= TOLERANCE[name], f"{name}: the losses differ by {error:.1e} from the reference"
    return error


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DeviceSettings, argv, "trainers", __doc__)
    device = settings.device
    rows, data = [], []
    for name, make in MODELS.items():
        error = check(name, device)
        count = 2 if settings.smoke else COUNTS[device][name]
        steps = 5 if settings.smoke else STEPS[name]
        trainings = make(count, device)
        candidate = {"train": partial(trainings.run, steps)}
        rounds = 2 if settings.smoke else 5
        timing = side_by_side({name: [candidate]}, device, rounds=rounds)[name]["total"]
        rates = [f"{count / t:,.0f}" for t in (timing.median, timing.high, timing.low)]
        rows.append([name, f"{steps}", f"{count}", rates[0], f"{rates[1]}-{rates[2]}"])
        record = {"model": name, "steps": steps, "trainings": count, "error": error}
        data.append(record | asdict(timing))
    write_table(
        f"trainers_{device}",
        "LoRA-ML trainings a second, side by side",
        f"python -m benchmarks.trainers --device {device}",
        ["model", "steps", "at once", "trainings a second", "quartiles"],
        rows,
        data,
        settings.write,
        device,
    )


if __name__ == "__main__":
    main()
