"""Measures `metalora.meta.token_losses` beside logits that stand whole: memory and time.

python -m benchmarks.token_losses [--device cuda] [--write DIR]

The losses of the tokens of one pass, and the gradients of what the output layer takes and of its
weight. Whole: product, cross-entropy of all logits in float32. Memory is what a call takes at most
beside its inputs, the gradients included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.lib.cases import Benchmark, Candidate, Options, Precision
from benchmarks.lib.measure import peak_bytes
from benchmarks.lib.operators import command
from benchmarks.lib.tensor_case import Function, Setup, TensorCase
from metalora.meta import token_losses

EXACT_ROWS = 64  # of the exact logits in float64 that exist at a time
LARGEST_WHOLE = 2**27  # logits on a CPU; more would take gigabytes


def _whole(labels: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    logits = F.linear(x, weight)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels.to(x.device), reduction="none")


def _plain(setup: Setup) -> Function:
    return partial(_whole, setup.case.labels())


def _metalora(setup: Setup) -> Function:
    case, labels = setup.case, setup.case.labels().to(setup.device)[None]

    def losses(x: Tensor, weight: Tensor) -> Tensor:
        head = nn.Linear(case.features, case.vocabulary, bias=False, device="meta")
        head._parameters["weight"] = weight  # type: ignore[assignment]  # whose gradient is taken
        return token_losses(x[None], labels, head)[0]

    return losses


FUNCTIONS: dict[str, Callable[[Setup], Function]] = {"plain": _plain, "metalora": _metalora}


@dataclass(frozen=True)
class TokenCase(TensorCase):
    """The tokens of a pass, features of each, and the vocabulary."""

    tokens: int
    features: int
    vocabulary: int

    functions = FUNCTIONS

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            "x": (self.tokens, self.features),
            "weight": (self.vocabulary, self.features),
            "grad": (self.tokens,),
        }

    def labels(self) -> Tensor:
        """int64 [tokens], spread over the vocabulary."""
        return torch.arange(self.tokens) * 7919 % self.vocabulary

    def tensors(
        self, precision: Precision, device: str = "cpu", seed: int = 0
    ) -> dict[str, Tensor]:
        found = super().tensors(precision, device, seed)
        return {**found, "grad": found["grad"].float()}  # the losses are in float32

    def offered(self, names: Sequence[str]) -> list[str]:
        whole = self.group != "cpu" or self.tokens * self.vocabulary <= LARGEST_WHOLE
        return [name for name in names if whole or name != "plain"]

    def exact(self, version: str, **inputs: Tensor) -> Tensor:
        parts = zip(inputs["x"].split(EXACT_ROWS), self.labels().split(EXACT_ROWS), strict=True)
        weight = inputs["weight"]
        return torch.cat(
            [checkpoint(_whole, of, x, weight, use_reentrant=False) for x, of in parts]
        )

    def candidates(self, precision: Precision, options: Options) -> Callable[[str], Candidate]:
        make = super().candidates(precision, options)

        def with_memory(version: str) -> Candidate:
            found = make(version)
            steps = found.sets[0]

            def call() -> None:
                for step in steps.values():
                    step()

            return replace(found, peak_bytes=peak_bytes(call, options.device))

        return with_memory

    def shrunk(self) -> TokenCase:
        return replace(self, tokens=70, features=8, vocabulary=50)


# Vocabularies of GPT-2, Llama 2 and Llama 3; tokens of a pass.
SIZES = {
    "cpu": ((1024, 128, 32_000), (1024, 128, 128_000), (2048, 128, 128_000)),
    "cuda": ((4096, 4096, 32_000), (4096, 4096, 128_000), (16384, 4096, 128_000)),
}
BENCHMARK = Benchmark(
    "token_losses",
    "Losses of tokens, forward + backward",
    tuple(
        TokenCase("token_losses", group, f"{n} tokens {h}→{v:,}", n, h, v, once=True)
        for group, sizes in SIZES.items()
        for n, h, v in sizes
    ),
    {"all": tuple(FUNCTIONS)},
    floor="plain",
    precisions=("fp32", "autocast"),
)

main = command(BENCHMARK, __doc__)
if __name__ == "__main__":
    main()
