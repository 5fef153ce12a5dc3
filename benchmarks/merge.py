"""Bandwidth of `merge_lora` and its backward: bytes that must move over the time it takes.

python -m benchmarks.merge [--device cuda] [--write DIR]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from benchmarks.ceilings import ceilings, copy_bandwidth
from benchmarks.lib.cli import DeviceSettings, parse
from benchmarks.lib.gate import GateError
from benchmarks.lib.measure import (
    Steps,
    beside_default_stream,
    copies_past_the_cache,
    graphed,
    side_by_side,
)
from benchmarks.lib.registry import PRECISIONS, SCALING, Precision
from benchmarks.lib.tables import write_table
from experiments.lib.cli import main_guard
from metalora import ops, reference

LARGE = 64e6  # bytes from which on the kernels are to reach 80 % of a copy
# (T, out, in, r)
SHAPES = (
    (10, 768, 768, 8),
    (10, 3072, 768, 8),
    (4, 4096, 4096, 16),
    (16, 4096, 4096, 16),
    (16, 4096, 4096, 64),
)


class Merge:
    """W [out, in] in float32 merged for T tasks into the dtype of the activations, and back."""

    def __init__(
        self, shape: tuple[int, int, int, int], precision: Precision, device: str, seed: int
    ) -> None:
        tasks, outer, inner, rank = shape
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, device=device)

        sizes = ((outer, inner), (tasks, rank, inner), (tasks, outer, rank))
        self.inputs = [draw(*size).requires_grad_() for size in sizes]
        self.dtype, self.tolerance = precision.activations, precision.tolerance
        self.grad = draw(tasks, outer, inner).to(self.dtype)

    def forward(self) -> None:
        weight, lora_A, lora_B = self.inputs
        self.merged = ops.merge_lora(weight, lora_A, lora_B, SCALING, dtype=self.dtype)

    def backward(self) -> None:
        self.gradients = torch.autograd.grad(self.merged, self.inputs, self.grad)

    def check(self) -> float:
        """The largest relative error of any result against float64."""
        weight, lora_A, lora_B, grad = (t.detach().double() for t in (*self.inputs, self.grad))
        exact = reference.merge_lora(weight, lora_A, lora_B, SCALING)
        gradients = reference.merge_lora_backward(grad, lora_A, lora_B, SCALING)
        worst = 0.0
        for got, wanted in zip((self.merged, *self.gradients), (exact, *gradients), strict=True):
            error = float((got.detach().double() - wanted).norm() / wanted.norm())
            if not error <= self.tolerance:
                raise GateError(f"merge_lora {list(got.shape)} has a relative error of {error:.1e}")
            worst = max(worst, error)
        return worst

    def traffic(self) -> dict[str, int]:
        """Bytes, if every input is read once and every result written once."""
        weight, lora_A, lora_B = (t.nbytes for t in self.inputs)
        merged = self.grad.nbytes
        factors = lora_A + lora_B
        return {
            "forward": weight + factors + merged,
            "backward": merged + factors + weight + factors,
        }


def measure(
    shape: tuple[int, int, int, int], precision: Precision, device: str, rounds: int
) -> dict[str, dict[str, float]]:
    """For forward and backward: bytes, error, and the timing."""
    with precision.products():
        first = Merge(shape, precision, device, 0)
        traffic = first.traffic()
        copies = copies_past_the_cache(min(traffic.values()), device)
        merges = [first, *(Merge(shape, precision, device, seed) for seed in range(1, copies))]
        steps: list[Steps] = []
        for merge in merges:
            with beside_default_stream(device):
                merge.forward()
                merge.backward()
            one: Steps = {"forward": merge.forward, "backward": merge.backward}
            steps.append(graphed(one)[0] if device == "cuda" else one)
        error = first.check()
        timings = side_by_side({"": steps}, device, rounds=rounds)[""]
    return {
        step: {"bytes": count, "error": error, **asdict(timings[step])}
        for step, count in traffic.items()
    }


@main_guard
def main(argv: Sequence[str] | None = None) -> None:
    settings = parse(DeviceSettings, argv, "merge", __doc__)
    device, smoke = settings.device, settings.smoke
    ceiling = copy_bandwidth(ceilings(device, smoke))
    rows, data = [], []
    for tasks, outer, inner, rank in [(2, 24, 16, 4)] if smoke else SHAPES:
        for name in ("autocast", "tf32", "fp32"):
            found = measure(
                (tasks, outer, inner, rank), PRECISIONS[name], device, 2 if smoke else 25
            )
            for step, one in found.items():
                speed = one["bytes"] / one["median"]
                rows.append(
                    [
                        *(f"T{tasks} {inner}→{outer} r{rank}", name, step),
                        *(f"{one['bytes'] / 1e6:,.1f}", f"{one['median'] * 1e6:,.1f}"),
                        *(f"{speed / 1e9:,.0f}", f"{100 * speed / ceiling:.0f} %"),
                        *(f"{100 * one['spread']:.1f} %", f"{one['error']:.0e}"),
                        "" if one["bytes"] >= LARGE else "below 64 MB",
                    ]
                )
                case = {"tasks": tasks, "out": outer, "in": inner, "rank": rank}
                share = {"share_of_copy": speed / ceiling}
                data.append({**case, "precision": name, "step": step, **one, **share})
    write_table(
        f"merge_{device}",
        f"Bandwidth of merge_lora and its backward; a copy reaches {ceiling / 1e9:,.0f} GB/s",
        f"python -m benchmarks.merge --device {device}",
        [
            *("", "precision", "", "MB", "µs", "GB/s", "share of copy", "spread of two runs"),
            *("error", ""),
        ],
        rows,
        data,
        settings.write,
        device,
    )


if __name__ == "__main__":
    main()
