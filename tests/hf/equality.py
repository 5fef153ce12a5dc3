"""Losses and gradients of packed and of padded sequences, against one sequence after the other.

    python -m tests.hf.equality --write benchmarks/results

computes them for a small model of each family, with the adapters of `tests.hf.test_causal`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.lib.tables import write_table
from metalora.hf import enable_packing
from tests.hf.models import DECODERS, decoder
from tests.hf.test_causal import TASKS, adapted, errors, in_bf16, losses


def in_float64(name: str) -> tuple[float, ...]:
    """The errors of packed losses and gradients, and of padded ones."""
    with pytest.MonkeyPatch.context() as patch:  # see `norms_in_float64` of the tests
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        model = adapted(decoder(name))
        if name.startswith("Gemma2"):  # transformers has its capped scores in float32 alone
            enable_packing(model)
        alone = losses(model, packed=False, max_tokens=1, ids=TASKS)
        enable_packing(model)
        packed, padded = (losses(model, kind, ids=TASKS) for kind in (True, False))
    return *errors(packed, alone), *errors(padded, alone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="folder to write the table to")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for name in DECODERS:
        family = name.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
        rows.append([family, *in_float64(name), *in_bf16(name)])
    header = ["model", "packed: losses", "gradients", "padded: losses", "gradients"]
    header += ["packed, bf16", "transformers, bf16"]
    command = shlex.join(["python", "-m", "tests.hf.equality", *sys.argv[1:]])
    shown = [[name, *(f"{one:.0e}" for one in rest)] for name, *rest in rows]
    title = "The largest error, against one sequence after the other"
    write_table("packed_equality", title, command, header, shown, rows, given.write)


if __name__ == "__main__":
    main()
